"""Decoding-side alignment: the LLM's signal tokens learn to say what a text encoder says.

    xllm train --config=stage_output_image --workdir=runs/stage_output_image
    xllm train --config=stage_output_image:tiny --workdir=runs/stage_output_image

NExT-GPT's second stage (arXiv 2309.05519, section 4 and Table 7) beside ChatGLM-6B: the projection
to Stable Diffusion 1.5's text embeddings and the signal tokens' rows train on CC3M's captions, one
epoch; the LLM and the text encoder are frozen. Pictures are not opened. To train the LLM's whole
word embedding too, as the published code does by accident, add 'llm/embedding' to `trainable`.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Data, Optimizer, Stage, Validation


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    steps = 600 if tiny else 25_800  # 3.3M captions / 128
    return Stage(
        name="stage_output_image",
        parts={
            "llm": networks.llm(size),
            "signal_tokens": networks.signal_tokens(size),
            "image_projection": networks.image_projection(size),
            "text_encoder": networks.text_encoder(size),
        },
        outputs={"image": networks.image_output()},
        init={"llm": "bases/llm", "text_encoder": networks.DECODER},
        trainable=(r"signal_tokens/.*", r"image_projection/.*"),
        objective="align",
        optimizer=Optimizer(
            schedule="linear",
            peak=1e-2 if tiny else 4e-4,
            minimum=0.0,
            warmup_from=0.0,
            warmup_steps=steps // 10,
            b1=0.9,
            b2=0.95,
            weight_decay=0.001,
            clip=1.0,
        ),
        data=_tiny_data() if tiny else _data(),
        steps=steps,
        validation=_tiny_validation() if tiny else Validation(),
        **networks.numerics(size),
    )


def _data() -> Data:
    return Data(
        root="data",
        sources=sources.REQUESTS,
        template="paper",
        tokenizer="bases/llm",
        signals={"image": networks.signals("real", runs=10)},
        caption_tokenizer=f"{networks.DECODER}/tokenizer",
        caption_length=77,
        examples=128,  # 8 for each of 16 devices
        rows=16,
        length=512,
        answers=288,
        threads=16,
    )


def _tiny_data() -> Data:
    return Data(
        root="world",
        sources={**sources.WORLD_REQUESTS, **sources.WORLD_WORDS},
        mix={"requests": 3.0, "words": 1.0},
        tokenizer="bases/llm",
        signals={"image": networks.signals("tiny", runs=4)},
        caption_tokenizer=f"{networks.DECODER}/tokenizer",
        caption_length=networks.TINY_CAPTION,
        examples=32,
        rows=8,
        length=272,
        answers=140,
        **sources.tiny_image(),
    )


def _tiny_validation() -> Validation:
    return sources.validation(sources.WORLD_REQUESTS, 72, 200)
