"""What a run leaves: every part that trained, as a base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from xllm_jax.assembly.system import System
from xllm_jax.core import checkpoint, rules
from xllm_jax.feature_cache import check
from xllm_jax.training.step import TrainState


def write(
    system: System,
    state: TrainState,
    base: Mapping[str, str],
    cached: Mapping[str, str],
    directory: Path,
) -> None:
    """Writes every part that trained, whole, as a base that later stages can name.

    Args:
      system: that was trained.
      state: at its end.
      base: {part: identity of its frozen parameters}.
      cached: {parameter: checksum} of what the run did not load.
      directory: that is written.
    """
    params = rules.join(state.trainable, state.frozen)
    trained = {part: params[part] for part in state.trainable}
    trained = check.completed(system, trained, cached)
    about = {"stage": dataclasses.asdict(system.stage), "base": dict(base)}
    checkpoint.save_base(directory, trained, about)
