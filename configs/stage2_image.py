"""Stage 2, image: align the image interface with the frozen LLM (paper section 3.3, Table 7).

    xllm train --config=stage2_image --workdir=runs/stage2_image
    xllm train --config=stage2_image:tiny --workdir=runs/stage2_image

Trains the Q-Former, its queries and the adapter on 14M image-text pairs, five epochs. The "no init"
row of Table 1 is --config.init.image_interface= (an empty value). The reference repository
accumulates 32 micro-batches without dividing and uses beta2 0.999; the paper's values stand here.
The tiny stage begins with the embedded world's BLIP-2 (`world_blip2.py`); what stage 1 gave is
--config.init.image_interface='runs/stage1_image*'.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Data, Optimizer, Stage, Validation


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    return Stage(
        name="stage2_image",
        parts={
            "vision_encoder": networks.vision_encoder(size),
            "image_interface": networks.visual_interface(size),
            "llm": networks.llm(size),
        },
        modalities={"image": networks.MODALITIES["image"]},
        init={
            "vision_encoder": "bases/vision_encoder",
            "image_interface": "bases/blip2_stage2*" if tiny else "bases/blip2_stage2",
            # The miniature's BLIP-2 has a projection to its own LLM, of the same width.
            **({"image_interface/adapter": ""} if tiny else {}),
            "llm": "bases/llm",
        },
        trainable=(r"image_interface/.*",),
        objective="answer",
        optimizer=Optimizer(peak=2e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=50, clip=1.0)
        if tiny
        else Optimizer(
            peak=3e-5, minimum=1e-8, warmup_from=1e-6, warmup_steps=6000, accumulation=16
        ),
        data=_tiny_data() if tiny else _data(),
        steps=1200 if tiny else 136_700,  # 14M pairs x 5 epochs / (4 x 16 x 8)
        validation=_tiny_validation() if tiny else _validation(),
        **networks.numerics(size),
    )


def _data() -> Data:
    return Data(
        root="data",
        sources=sources.image_text_pairs(),
        template="chatglm_zh",
        tokenizer="bases/llm",
        examples=32,
        rows=32,
        length=96,
        answers=33,
        items={"image": 1},
        embeddings={"image": 32},
        image={"size": 224, "orientation": "exif", "scale": (0.5, 1.0), "flip": True},
        threads=16,
    )


def _tiny_data() -> Data:
    return Data(
        root="world",
        sources={k: sources.WORLD[k] for k in ("captions", "regions", "questions")},
        mix={"captions": 0.4, "regions": 0.2, "questions": 0.4},
        tokenizer="bases/llm",
        examples=24,
        rows=8,
        length=176,
        answers=41,
        items={"image": 3},
        embeddings={"image": networks.TINY_QUERIES},
        **sources.tiny_image(),
    )


def _validation() -> Validation:
    return sources.validation(
        {k: sources.image_text_pairs()[k] for k in ("coco", "flickr30k")}, 1024, 0
    )


def _tiny_validation() -> Validation:
    return sources.validation({k: sources.WORLD[k] for k in ("captions", "questions")}, 72, 300)
