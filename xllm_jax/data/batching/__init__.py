"""Batch formats, one file each: how examples become the arrays of a step."""
