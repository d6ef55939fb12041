"""Stage 1, image: the Q-Former learns to read images by ITC, ITM and ITG (BLIP-2's first stage).

    xllm train --config=stage1_image --workdir=runs/stage1_image
    xllm train --config=stage1_image:tiny --workdir=runs/stage1_image

The paper skips this stage by loading BLIP-2's Q-Former; it is here for those who start without one,
and because Table 1 compares both. The vision encoder stays frozen.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Data, Optimizer, Stage, Validation


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    return Stage(
        name="stage1_image",
        parts={
            "vision_encoder": networks.vision_encoder(size),
            "image_interface": networks.pretraining_interface(size),
        },
        modalities={"image": networks.MODALITIES["image"]},
        init={
            "vision_encoder": "bases/vision_encoder",
            "image_interface/qformer": "bases/bert_qformer:qformer*",
            "image_interface/language_head": "bases/bert_qformer:language_head*",
        },
        trainable=(r"image_interface/.*",),
        objective="blip2_pretraining",
        options={"shares": _shares(tiny)},
        optimizer=Optimizer(peak=2e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=50, clip=1.0)
        if tiny
        else Optimizer(peak=1e-4, minimum=1e-5, warmup_from=1e-6, warmup_steps=5000),
        data=_tiny_data() if tiny else _data(),
        steps=400 if tiny else 250_000,
        validation=_tiny_validation() if tiny else _validation(),
        **networks.numerics(size, remat="products") | {"compiler": networks.whole_products()},
    )


def _shares(tiny: bool) -> dict[str, float]:
    """BLIP-2 adds the losses as they are. In a training as short as the miniature's, ITC at full
    weight makes all queries alike before ITG has parted them."""
    return {"itc": 0.1, "itm": 0.5, "itg": 1.0} if tiny else {"itc": 1.0, "itm": 1.0, "itg": 1.0}


def _data() -> Data:
    return Data(
        root="data",
        batch_format="image_text_pairs",
        sources=sources.image_text_pairs(),
        vocabulary="bases/bert/vocab.txt",
        examples=2320,
        text_length=32,
        image={"size": 224, "orientation": "exif", "scale": (0.5, 1.0), "flip": True},
        threads=16,
    )


def _tiny_data() -> Data:
    return Data(
        root="world",
        batch_format="image_text_pairs",
        # Descriptions of single objects, as Visual Genome's among BLIP-2's pairs: from whole scenes
        # alone, ITG learns sizes and numbers but no color in as many steps.
        sources={k: sources.WORLD[k] for k in ("captions", "regions")},
        mix={"captions": 0.4, "regions": 0.6},
        vocabulary="bases/vocab.txt",
        examples=32,
        text_length=48,
        **sources.tiny_image(),
    )


def _validation() -> Validation:
    return sources.validation(
        {k: sources.image_text_pairs()[k] for k in ("coco", "flickr30k")}, 4640, 0
    )


def _tiny_validation() -> Validation:
    return sources.validation({"captions": sources.WORLD["captions"]}, 60, 100)
