"""X-LLM (arXiv 2305.04160) in JAX and Flax: images, video and speech as foreign languages.

Where the paper is, by file:

    3.1 image and video interface   models/qformer.py, models/interfaces.py
    3.1 speech interface            models/cif.py, models/speech_interface.py, models/conformer.py
    3.1 LLM                         models/glm.py, models/causal.py
    3.2 stage 1, convert, speech    objectives/asr.py, models/asr.py
    3.2 stage 1, convert, image     objectives/blip2_pretraining.py, models/blip2_pretraining.py
    3.3 stage 2, align              objectives/answer.py, configs/stage2_*.py
    3.4 stage 3, integrate          configs/stage3_instruction.py, data/text/prompt.py
    Table 5, data sets              data/sources/, configs/sources.py
    Table 7, training recipe        configs/

Letters in shapes: B batch rows, T text tokens, N patches or queries, F video frames, U speech
frames, S fired tokens, D width, H heads, K head dim, V vocabulary, L layers, M media items of a
row, A supervised tokens of a row.
"""
