"""A stage-1 ASR model that trains in seconds, on recordings of noise in two length buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile

from xllm_jax.core.stage import Data, Optimizer, Part, Source, Stage
from xllm_jax.data.example import Example
from xllm_jax.data.text.characters import CharacterVocabulary

SAID = ("红色的圆", "蓝色的方块", "有几个物体", "对")


def make(folder: Path) -> tuple[Stage, list[Example]]:
    """Recordings of two lengths for two length buckets, and a very small ASR stage."""
    rng, examples = np.random.default_rng(0), []
    for number in range(16):
        path = folder / f"{number}.flac"
        sound = rng.normal(size=8000 + 8000 * (number % 2)).astype(np.float32) * 0.1
        soundfile.write(path, sound, 16000)
        said = SAID[number % len(SAID)]
        examples.append(
            Example(f"u{number}", (("speech", str(path)),), "", said, "asr", transcript=said)
        )
    CharacterVocabulary.build(SAID).save(folder / "characters.txt")
    sizes = {"width": 16, "hidden": 16, "heads": 2}
    encoder = sizes | {"depth": 1, "pools": (), "channels": 4, "kernel": 3}
    interface = sizes | {"depth": 1, "encoder_width": 16, "positions": 32, "llm_width": 8}
    blocks = {"vocab": 32, "self_blocks": 1, "visual_blocks": 1, "linguistic_blocks": 1}
    stage = Stage(
        name="speech",
        parts={
            "speech_encoder": Part("conformer.SpeechEncoder", "tiny", encoder),
            "speech_interface": Part("speech_interface.SpeechInterface", "tiny", interface),
            "asr_decoder": Part("asr.ASRDecoder", "tiny", sizes | blocks),
        },
        trainable=("speech_encoder/.*", "speech_interface/cif/.*", "asr_decoder/.*"),
        objective="asr",
        optimizer=Optimizer(peak=1e-3),
        data=Data(
            batch_format="transcription",
            sources={"a": Source("list")},
            characters=str(folder / "characters.txt"),
            examples=2,
            frames=(60, 110),
            characters_length=8,
            threads=1,
        ),
        steps=8,
        compute="float32",
        frozen="float32",
        log_every=2,
        save_every=100,
        profile=(4, 5),
    )
    return stage, examples
