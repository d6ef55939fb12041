"""Stage 2, video: align the video interface with the frozen LLM (paper section 3.3, Table 7).

    xllm train --config=stage2_video --workdir=runs/stage2_video
    xllm train --config=stage2_video:tiny --workdir=runs/stage2_video

Starts from the stage-2 image interface and trains all of it on MSR-VTT; each frame gives 32
embeddings, frames in time order. The reference repository trains only the queries and the
projection: --config.trainable="('video_interface/(queries|adapter/.*)',)".
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Data, Optimizer, Stage, Validation


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    return Stage(
        name="stage2_video",
        parts={
            "vision_encoder": networks.vision_encoder(size),
            "video_interface": networks.visual_interface(size),
            "llm": networks.llm(size),
        },
        modalities={"video": networks.MODALITIES["video"]},
        init={
            "vision_encoder": "bases/vision_encoder",
            "video_interface": "runs/stage2_image:image_interface",
            "llm": "bases/llm",
        },
        trainable=(r"video_interface/.*",),
        objective="answer",
        optimizer=Optimizer(peak=1e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=30, clip=1.0)
        if tiny
        else Optimizer(peak=1e-5, minimum=1e-8, warmup_from=1e-6, warmup_steps=200, accumulation=4),
        data=_tiny_data() if tiny else _data(),
        steps=450 if tiny else 600,  # 7.7k clips x 5 epochs / (2 x 16 x 2)
        validation=_tiny_validation() if tiny else _validation(),
        **networks.numerics(size),
    )


def _data() -> Data:
    return Data(
        root="data",
        sources={"msrvtt": sources.MSRVTT},
        tokenizer="bases/llm",
        examples=16,
        rows=16,
        length=384,
        answers=33,
        items={"video": 10},
        embeddings={"video": 32},
        image={"size": 224},
        video={"frames": 10},
        threads=16,
    )


def _tiny_data() -> Data:
    return Data(
        root="world",
        # Captions alone teach a known pair of shape and color as one word; questions part them.
        sources={k: sources.WORLD[k] for k in ("clips", "clip_questions")},
        mix={"clips": 0.6, "clip_questions": 0.4},
        tokenizer="bases/llm",
        examples=16,
        rows=16,
        length=136,
        answers=16,
        items={"video": 4},
        embeddings={"video": networks.TINY_QUERIES},
        video={"frames": 4},
        **sources.tiny_image(),
    )


def _validation() -> Validation:
    return sources.validation({"msrvtt": sources.MSRVTT}, 496, 0)


def _tiny_validation() -> Validation:
    return sources.validation({"clips": sources.WORLD["clips"]}, 30, 150)
