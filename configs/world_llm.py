"""Pre-trains the mini-GLM on the embedded world's text alone: GLM's objective and reading.

    xllm train --config=world_llm --workdir=runs/world_llm

The text stream holds written scenes, frames and sentences between the tags where features come
later, so that the LLM can read and answer before it ever sees or hears. Its result is the
first part of the LLM that ships; `make backbones` runs this file again.
"""

from xllm_jax.configs import networks
from xllm_jax.core.stage import Data, Optimizer, Source, Stage

# Shares, see `text_stream.text_example`: some by characters and some frames without names, as
# interfaces give them; and words in no order to repeat, so that they are heard and not guessed.
AS_HEARD = {"spelled": 0.3, "unnamed": 0.3, "shuffled": 0.5}


def get_config(size: str = "tiny") -> Stage:
    return Stage(
        name="world_llm",
        parts={"llm": networks.llm(size)},
        init={"llm": ""},  # --config.init.llm=bases/llm goes on from the shipped one
        trainable=(r"llm/.*",),
        objective="answer",
        optimizer=Optimizer(
            peak=2e-3, minimum=2e-5, warmup_from=1e-5, warmup_steps=300, clip=1.0, b2=0.98
        ),
        data=Data(
            sources={"text": Source("world_text", options={"count": 400_000, **AS_HEARD})},
            batch_format="blank_infilling",
            tokenizer="bases/llm",
            examples=44,
            rows=16,
            length=128,
            answers=48,
        ),
        steps=20_000,
        **networks.numerics(size),
    )
