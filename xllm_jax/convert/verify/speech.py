"""Recordings of the speech parts: CIF, conformer, ASR model, decoder, C-Former, filterbanks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from xllm_jax.convert.verify import (
    speech_asr,
    speech_cif,
    speech_conformer,
    speech_features,
    speech_interface,
    speech_losses,
)
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.tolerances import Stated

UNIT = "at least one"
# Where the README states what; the first fitting row counts.
TOLERANCES = (
    Stated("cif_cases.npz", "*/quantity", "cif_cases", 1, "relative"),
    Stated("cif_cases.npz", "*/alpha_scaled", "cif_cases", 1, UNIT),
    Stated("cif_cases.npz", "*", "cif_cases", 0, UNIT),
    Stated("cif_module.npz", "*quantity", "cif_cases", 1, "relative"),
    Stated("cif_module.npz", "*/alpha", "cif_module", 0, UNIT),
    Stated("cif_module.npz", "*/train_d_h", "cif_module", 2, UNIT),
    Stated("cif_module.npz", "*/train_grad/*", "cif_module", 2, UNIT),
    Stated("cif_module.npz", "*", "cif_module", 1, UNIT),
    Stated("conformer.npz", "*/d_x", "conformer", 1, UNIT),
    Stated("conformer.npz", "*/grad/*", "conformer", 1, UNIT),
    Stated("conformer.npz", "*", "conformer", 0, UNIT),
    Stated("asr_model.npz", "*loss", "asr_model", 1, "relative"),
    Stated("asr_model.npz", "*/grad/*", "asr_model", 2, "largest"),
    Stated("asr_model.npz", "*", "asr_model", 0, UNIT),
    Stated("decoder_cross_attn.npz", "*", "decoder_cross_attn"),
    Stated("cformer.npz", "d_*", "cformer", 1, UNIT),
    Stated("cformer.npz", "grad/*", "cformer", 1, UNIT),
    Stated("cformer.npz", "*", "cformer", 0, UNIT),
    Stated("losses.npz", "*loss", "losses", 0, "relative"),
    Stated("losses.npz", "*", "losses", 1),
    Stated("fbank.npz", "fbank*", "fbank", 2),
    Stated("fbank.npz", "specaug*", "fbank", 4),
    Stated("fbank.npz", "*", "fbank", 3),
    Stated("lr_schedule.npz", "*", "lr_schedule", 0, "relative"),
)
STEPS: dict[str, Callable[[Replay], None]] = {
    "cif_cases.npz": speech_cif.cases,
    "cif_module.npz": speech_cif.module,
    "conformer.npz": speech_conformer.layer,
    "asr_model.npz": speech_asr.model,
    "decoder_cross_attn.npz": speech_asr.cross_attention,
    "cformer.npz": speech_interface.c_former,
    "losses.npz": speech_losses.losses,
    "fbank.npz": speech_features.filterbanks,
    "lr_schedule.npz": speech_losses.schedule,
}


def recognized(folder: Path) -> bool:
    """Whether the folder holds a known file of arrays with its settings beside it."""
    return any(
        (folder / name).exists() and (folder / name).with_suffix(".json").exists() for name in STEPS
    )


def steps(folder: Path) -> dict[str, Callable[[Replay], None]]:
    """{file: what replays it}."""
    return STEPS
