"""Stage 3: integrate. Only the adapters are tuned, on a small multimodal instruction set.

    xllm train --config=stage3_instruction --workdir=runs/stage3
    xllm train --config=stage3_instruction:tiny --workdir=runs/stage3

10k instructions: MiniGPT-4 (zh) 3.5k, AISHELL-2 2k, ActivityNet 1k, VSDial-CN 1k and the rest as in
the paper; two epochs at a constant 1e-6 (paper section 3.4, Table 7).
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Data, Optimizer, Stage, Validation

INSTRUCTIONS = {  # of 24
    "image_questions": 12.0,
    "spoken_images": 4.0,
    "transcripts": 1.0,
    "image_transcripts": 3.0,
    "clip_questions": 4.0,
}


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    return Stage(
        name="stage3_instruction",
        parts={
            "vision_encoder": networks.vision_encoder(size),
            "speech_encoder": networks.speech_encoder(size),
            "image_interface": networks.visual_interface(size),
            "video_interface": networks.visual_interface(size),
            "speech_interface": networks.speech_interface(size),
            "llm": networks.llm(size),
        },
        modalities=dict(networks.MODALITIES),
        init={
            "vision_encoder": "bases/vision_encoder",
            "speech_encoder": "runs/stage1_speech",
            "image_interface": "runs/stage2_image",
            "video_interface": "runs/stage2_video",
            "speech_interface": "runs/stage2_speech",
            "llm": "bases/llm",
        },
        trainable=(r"(image|video|speech)_interface/adapter/.*",),
        objective="answer",
        optimizer=Optimizer(
            schedule="cosine", peak=1e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=20, clip=1.0
        )
        if tiny
        else Optimizer(schedule="constant", peak=1e-6, accumulation=4),
        data=_tiny_data() if tiny else _data(),
        steps=360 if tiny else 312,  # 10k instructions x 2 epochs / (2 x 16 x 2)
        validation=_tiny_validation() if tiny else _validation(),
        **networks.numerics(size),
    )


def _data() -> Data:
    return Data(
        root="data",
        sources=sources.INSTRUCTIONS,
        mix={"minigpt4_zh": 3.5, "aishell2": 2.0, "activitynet": 1.0, "vsdial_cn": 3.5},
        template="paper",
        tokenizer="bases/llm",
        characters="bases/characters.txt",
        examples=16,
        rows=16,
        length=640,
        answers=200,
        items={"image": 1, "video": 10, "speech": 1},
        embeddings={"image": 32, "video": 32, "speech": 48},
        frames=(1600,),
        image={"size": 224, "orientation": "exif"},
        video={"frames": 10},
        threads=16,
    )


def _tiny_data() -> Data:
    return Data(
        root="world",
        # All instructions, and speech beside pictures to write down, Table 4's S+V. As sources of
        # their own the kinds come in the same numbers in every batch of 24, so that it needs no
        # places for more clips or utterances than usual.
        sources={k: sources.WORLD[k] for k in INSTRUCTIONS},
        mix=dict(INSTRUCTIONS),
        tokenizer="bases/llm",
        characters="world/characters.txt",
        examples=24,
        rows=4,
        length=528,
        answers=58,
        items={"image": 5, "video": 4, "speech": 2},
        embeddings={
            "image": networks.TINY_QUERIES,
            "video": networks.TINY_QUERIES,
            "speech": networks.TINY_SPEECH_TOKENS,
        },
        frames=(networks.TINY_FRAMES[-1],),
        video={"frames": 4},
        **sources.tiny_image(),
    )


def _validation() -> Validation:
    return sources.validation(
        {k: sources.INSTRUCTIONS[k] for k in ("aishell2", "activitynet", "vsdial_cn")}, 512, 0
    )


def _tiny_validation() -> Validation:
    return sources.validation({"instructions": sources.WORLD["instructions"]}, 30, 110)
