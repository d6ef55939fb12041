"""Media files become arrays, one modality a file."""
