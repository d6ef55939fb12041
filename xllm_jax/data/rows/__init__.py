"""Annotations of any size, read where they lie: one row at a time."""
