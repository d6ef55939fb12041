"""Stage 1, speech: the CIF-based ASR model (paper section 3.2 and appendix A).

    xllm train --config=stage1_speech --workdir=runs/stage1_speech
    xllm train --config=stage1_speech:tiny --workdir=runs/stage1_speech

Trains speech encoder, CIF and ASR decoder from scratch with cross-entropy, quantity and CTC losses;
warm up 24k, hold 36k, decay 120k steps. Utterances come in length buckets, so that a batch wastes
little padding and compiles once per bucket.
"""

from xllm_jax.configs import networks, sources
from xllm_jax.core.stage import Data, Optimizer, Stage, Validation


def get_config(size: str = "real") -> Stage:
    tiny = networks.is_tiny(size)
    return Stage(
        name="stage1_speech",
        parts={
            "speech_encoder": networks.speech_encoder(size),
            "speech_interface": networks.speech_interface(size),
            "asr_decoder": networks.asr_decoder(size),
        },
        trainable=(
            r"speech_encoder/.*",
            r"speech_interface/cif/.*",
            r"asr_decoder/.*",
        ),
        objective="asr",
        options={"label_smoothing": 0.1, "quantity_weight": 1.0, "ctc_weight": 0.5},
        optimizer=Optimizer(
            schedule="tri_stage",
            peak=2e-3,
            warmup_from=2e-5,
            minimum=2e-5,
            warmup_steps=100,
            hold_steps=250,
            decay_steps=250,
            weight_decay=0.01,
            clip=5.0,
        )
        if tiny
        else Optimizer(
            schedule="tri_stage",
            peak=3e-4,
            warmup_from=3e-6,
            minimum=1.5e-5,
            warmup_steps=24_000,
            hold_steps=36_000,
            decay_steps=120_000,
            weight_decay=0.01,
        ),
        data=_tiny_data() if tiny else _data(),
        steps=600 if tiny else 180_000,
        validation=_tiny_validation() if tiny else _validation(),
        **networks.numerics(size) | {"compiler": networks.whole_products()},
    )


def _data() -> Data:
    return Data(
        root="data",
        batch_format="transcription",
        sources={k: sources.SPEECH[k] for k in ("aishell1", "aishell2", "vsdial_cn")},
        characters="bases/characters.txt",
        examples=128,
        frames=(256, 384, 512, 640, 832, 1088, 1600),
        characters_length=64,
        speech={"specaugment": True},
        threads=16,
    )


def _tiny_data() -> Data:
    return Data(
        root="world",
        batch_format="transcription",
        sources={k: sources.WORLD[k] for k in ("utterances", "spoken_questions")},
        characters="world/characters.txt",
        examples=16,
        # The voices of training are few, and what is asked aloud is said by another one.
        speech={"vtlp": 0.15},
        frames=networks.TINY_FRAMES,
        characters_length=networks.TINY_SPEECH_TOKENS,
    )


def _validation() -> Validation:
    return sources.validation(
        {k: sources.SPEECH[k] for k in ("aishell1", "aishell2", "vsdial_cn")}, 1024, 0, "cer"
    )


def _tiny_validation() -> Validation:
    return sources.validation(
        {k: sources.WORLD[k] for k in ("utterances", "spoken_questions")}, 64, 200, "cer"
    )
