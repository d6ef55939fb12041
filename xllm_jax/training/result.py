"""What a run leaves: every part that trained, as a base, or its adapters beside their base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from xllm_jax.assembly import adapter_source, parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import checkpoint, kernel_fingerprint, rules
from xllm_jax.core.types import Params
from xllm_jax.feature_cache import check
from xllm_jax.models import lora
from xllm_jax.models.xllm import LLM
from xllm_jax.training.step import TrainState


def write(
    system: System,
    state: TrainState,
    base: Mapping[str, str],
    cached: Mapping[str, str],
    directory: Path,
) -> None:
    """Writes every part that trained as a base that later stages can name.

    A part comes whole. One of which adapters alone trained, and which was loaded from a folder,
    leaves these: the stage says where the rest lies, and a hash of each kernel which one it is.
    The LLM's kernels have such a hash in any case, so that it may be packed in another way later.

    Args:
      system: that was trained.
      state: at its end.
      base: {part: identity of its frozen parameters}.
      cached: {parameter: checksum} of what the run did not load.
      directory: that is written.
    """
    params = rules.join(state.trainable, state.frozen)
    stage, paths = system.stage, rules.flatten(state.trainable)
    beside = [part for part in state.trainable if parameters.refers(stage, part, paths)]
    trained = {part: params[part] for part in state.trainable if part not in beside}
    trained = check.completed(system, trained, cached)
    about = {"stage": dataclasses.asdict(stage), "base": dict(base)}
    kernels: dict[str, str] = {}
    for part in beside:
        low = _adapters(part, params[part])
        trained |= low
        if jax.process_index() == 0:
            kernels |= parameters.fingerprints(stage, part, rules.flatten(low))
    if jax.process_index() == 0 and LLM not in state.trainable:
        kernels |= adapter_source.kernels_of(stage, LLM)
    about |= {kernel_fingerprint.FIELD: kernels} if kernels else {}
    checkpoint.save_base(directory, trained, about)


def _adapters(part: str, params: Params) -> Params:
    """{part: its adapters}."""
    flat = rules.flatten({part: params})
    return rules.unflatten({path: x for path, x in flat.items() if lora.is_adapter(path)})
