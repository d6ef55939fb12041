"""Computing what is frozen only once: its outputs become a cache that training reads.

    describe.py     which sections a stage's cache can hold, and all that its values depend on
    cache_plan.py   every medium once, cut into shards; what the folder holds already
    write.py        shards: decode, compute, write whole or not at all
    check.py        is the cache of this very stage? And what training must know of what it skips

What is cached follows from the Stage alone: the sections of a modality (`models/sections.py`) below
the first one that something trains in. `data/cached_features.py` reads a finished cache.
"""
