"""Recordings of NExT-GPT: output projections, losses, decoding, formats; LLaMA and LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from xllm_jax.convert.verify import (
    nextgpt_formats,
    nextgpt_generation,
    nextgpt_llama,
    nextgpt_lora,
    nextgpt_losses,
    nextgpt_textfc,
)
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.tolerances import Stated

TOLERANCES: tuple[Stated, ...] = ()  # tolerances.json lists every array
STEPS: dict[str, Callable[[Replay], None]] = {
    "textfc.npz": nextgpt_textfc.projections,
    "llama.npz": nextgpt_llama.models,
    "formats.npz": nextgpt_formats.batches,
    "lora.npz": nextgpt_lora.lora_on_attention,
    "losses.npz": nextgpt_losses.stages,
    "generation.npz": nextgpt_generation.answers,
}
MARK = "TextFcLayer", "NExT-GPT", "LlamaForCausalLM", "peft", "process_batch_stage"


def recognized(folder: Path) -> bool:
    """Whether a known file has settings beside it that speak of NExT-GPT's code or LLaMA's."""
    settings = [(folder / name).with_suffix(".json") for name in STEPS if (folder / name).exists()]
    return any(
        mark in path.read_text("utf-8") for path in settings if path.exists() for mark in MARK
    )


def steps(folder: Path) -> dict[str, Callable[[Replay], None]]:
    """{file: what replays it}."""
    return STEPS
