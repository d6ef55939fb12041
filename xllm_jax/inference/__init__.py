"""A trained run answers: it is loaded, prompted and decoded."""
