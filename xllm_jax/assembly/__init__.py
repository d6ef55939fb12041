"""A Stage becomes networks and parameters."""
