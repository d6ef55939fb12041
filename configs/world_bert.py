"""Pre-trains the mini BERT on the embedded world's text: hidden pieces, and text behind text.

    xllm train --config=world_bert --workdir=runs/world_bert

The miniature of bert-base: the Q-Former's text branch, its self-attention and the C-Former start
from it, as the real ones start from the published BERTs. Its result ships with the package; `make
backbones` runs this file again.
"""

from xllm_jax.configs import networks
from xllm_jax.core.stage import Data, Optimizer, Source, Stage

SHARES = {"caption_scene": 0.6, "region_scene": 0.1, "answer_scene": 0.3}


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_bert",
        parts={"text_model": networks.pretraining_interface(size)},
        init={"text_model": ""},
        trainable=(
            r"text_model/qformer/embeddings/.*",
            r"text_model/qformer/.*/(attention|text_feed_forward)(_end)?/.*",
            r"text_model/language_head/.*",
        ),
        objective="unilm",
        optimizer=Optimizer(
            peak=2e-3, minimum=2e-5, warmup_from=1e-5, warmup_steps=200, clip=1.0, b2=0.98
        ),
        data=Data(
            batch_format="text_pairs",
            sources={
                "text": Source("world_text", options={"count": 300_000, "shares": dict(SHARES)})
            },
            vocabulary="bases/vocab.txt",
            examples=32,
            text_length=48,
        ),
        steps=5000,
        **networks.numerics(size),
    )
