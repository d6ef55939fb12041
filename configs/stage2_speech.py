"""Stage 2, speech: align the C-Former with the frozen LLM (paper section 3.3, Table 7).

    xllm train --config=stage2_speech --workdir=runs/stage2_speech
    xllm train --config=stage2_speech:tiny --workdir=runs/stage2_speech

Speech encoder and CIF come from stage 1 and stay frozen; the C-Former starts from
bert-base-chinese. The reference repository has a ReLU behind the adapter:
--config.parts.speech_interface.fields.adapter_relu=True.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Data, Optimizer, Stage, Validation


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    return Stage(
        name="stage2_speech",
        parts={
            "speech_encoder": networks.speech_encoder(size),
            "speech_interface": networks.speech_interface(size),
            "llm": networks.llm(size),
        },
        modalities={"speech": networks.MODALITIES["speech"]},
        init={
            "speech_encoder": "runs/stage1_speech",
            "speech_interface/cif": "runs/stage1_speech",
            "speech_interface/c_former/bert": "bases/bert:bert*",
            "llm": "bases/llm",
        },
        trainable=(r"speech_interface/(?!cif/).*",),
        objective="answer",
        optimizer=Optimizer(peak=2e-3, minimum=1e-5, warmup_from=1e-5, warmup_steps=30, clip=1.0)
        if tiny
        else Optimizer(
            peak=1e-4, minimum=1e-8, warmup_from=1e-6, warmup_steps=6000, accumulation=16
        ),
        data=_tiny_data() if tiny else _data(),
        steps=240 if tiny else 80_000,  # 1.37M utterances x 30 epochs / (4 x 16 x 8)
        validation=_tiny_validation() if tiny else _validation(),
        **networks.numerics(size),
    )


def _data() -> Data:
    return Data(
        root="data",
        sources={k: sources.SPEECH[k] for k in ("aishell2", "vsdial_cn")},
        tokenizer="bases/llm",
        characters="bases/characters.txt",
        examples=32,
        rows=32,
        length=128,
        answers=64,
        items={"speech": 1},
        embeddings={"speech": 48},
        frames=(256, 384, 512, 640, 832, 1088, 1600),
        threads=16,
    )


def _tiny_data() -> Data:
    return Data(
        root="world",
        sources={k: sources.WORLD[k] for k in ("utterances", "spoken_questions")},
        tokenizer="bases/llm",
        characters="world/characters.txt",
        examples=32,
        rows=16,
        length=112,
        answers=20,
        items={"speech": 2},
        embeddings={"speech": networks.TINY_SPEECH_TOKENS},
        # The voices of training are few, and what is asked aloud is said by another one.
        speech={"vtlp": 0.15},
        frames=networks.TINY_FRAMES,
    )


def _validation() -> Validation:
    return sources.validation({k: sources.SPEECH[k] for k in ("aishell2", "vsdial_cn")}, 1024, 0)


def _tiny_validation() -> Validation:
    return sources.validation(
        {k: sources.WORLD[k] for k in ("utterances", "spoken_questions")}, 64, 80
    )
