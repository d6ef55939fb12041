"""Where a finished run's adapters lie, and whether a stage says of them what they are."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xllm_jax.assembly import parameters
from xllm_jax.core import base_description, checkpoint, damage, kernel_fingerprint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Params
from xllm_jax.models import lora

SAME = 1e-5  # of two alphas, relative: scales are float32


def holder(directory: str | Path, part: str) -> Path | None:
    """The folder with the adapters that a run has of a part: its result, or what it took them from
    and left as they were; None where it has none.

    Args:
      directory: of a run, of its result, or of adapters.
      part: of the run.
    """
    directory = Path(directory)
    final = directory / "final"
    folder = final if checkpoint.base_exists(final) else directory
    if not checkpoint.base_exists(folder):
        return None
    about = base_description.base_about(folder)
    if any(map(lora.is_adapter, parameters.below(part, about["shapes"]))):
        return folder
    with damage.reading(folder):
        stage = about.get("stage", {})
        named = [stage.get("lora", {}).get("init", ""), stage.get("init", {}).get(part, "")]
    for source in filter(None, named):
        path, _, other = source.removesuffix("*").partition(":")
        found = holder(parameters.resolved(path, folder), part) if not other else None
        if found:
            return found
    return None


def check_alpha(stage: Stage, trainable: Params, frozen: Params) -> None:
    """Compares the scales of adapters that a stage has taken with what it says of them.

    Args:
      stage: its `lora.alpha` is what a run's about.json states.
      trainable, frozen: its parameters.

    Raises:
      UserError: the adapters have another alpha; says which.
    """
    flat = rules.flatten(frozen) | rules.flatten(trainable)
    found: Counter[float] = Counter()
    for path, x in flat.items():
        if path.endswith(f"/{lora.SCALE}"):
            rank = flat[f"{path.removesuffix(lora.SCALE)}{lora.A}"].shape[-1]
            found.update((_whole(x).reshape(-1) * np.float64(rank)).tolist())
    if not found:
        return
    most = found.most_common(1)[0][0]
    if abs(most - stage.lora.alpha) <= SAME * abs(stage.lora.alpha):
        return
    many = " for most kernels" if len(found) > 1 else ""
    what = f"is {stage.lora.alpha:g}, and the adapters that the stage takes have {most:.7g}{many}"
    raise UserError(what, field="lora.alpha", hint=f"Say --config.lora.alpha={most:.7g}")


def _whole(x: jax.Array | np.ndarray) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, np.float64)


def known_kernels(about: Mapping[str, Any], part: str) -> dict[str, str]:
    """{kernel: hash} that a run or a base tells of a part."""
    return parameters.below(part, about.get(kernel_fingerprint.FIELD, {}))


def kernels_of(stage: Stage, part: str) -> dict[str, str]:
    """{kernel: hash} of a part that comes from a folder as it is; none of another one, nor of one
    that has gone since."""
    source = stage.init.get(part, "")
    if not source or source[-1] == "*" or ":" in source:
        return {}
    with contextlib.suppress(UserError):
        return kernels_in(parameters.origin(source, part)[0], part)
    return {}


def kernels_in(folder: Path, part: str) -> dict[str, str]:
    """{kernel: hash} of a part of a base."""
    leaves = parameters.below(part, checkpoint.open_leaves(folder))
    about = base_description.base_about(folder)
    return parameters.below(part, kernel_fingerprint.of_leaves(leaves, about))
