"""A trained run as a service: many requests at a time share one model."""
