"""Preparing a data set: any source becomes ArrayRecord shards, written by Apache Beam.

    preparation.py  what is to be done, cut into shards, and what has been done already
    shard.py        one shard: read, check, serialize, write whole or not at all
    engine.py       shards through a Beam runner, with progress
    runner.py       a function for every element, in threads here or on any runner of Beam
    manifest.py     counts, checksums and rejects of all shards; TFDS's own description
    transforms.py   speech, resampling, a look at every medium: what such a function does
    translators.py  texts into Chinese by a table, mBART-50 or an endpoint, kept as they are made
    translate.py    mBART-50; the one place that needs PyTorch
    endpoint.py     any OpenAI-compatible endpoint (its client: core/chat_endpoint.py)
    translation_faults.py   why a translation is left out
    pick.py         lists of picked records, for the reader 'selection'
    recipes/        what the paper built itself (launch/build_data.py)

Beam is imported when a pipeline runs; training and reading never do.
"""
