"""Suites on published data, one file each, found by name.

A suite has TITLE, ASKS (whether a model answers), `tasks(config, model)` with the samples of its
sets, and `report(config, found)` with its results and tables. `run.py` does what is the same for
all of them.
"""
