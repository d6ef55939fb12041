"""Tasks are asked of a model, scored, and compared with controls and intervals."""
