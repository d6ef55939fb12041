"""adapter_config.json as PEFT (0.3 to 0.21) writes it: what we can take of it, and our own."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_jax.convert import bounds
from xllm_jax.core.errors import UserError

FILE = "adapter_config.json"
# Fields that change what a module computes and that we do not have, unless they are off.
OFF = (
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "fan_in_fan_out",
)
# How these begin, the base is changed too.
CHANGING = ("pissa", "olora", "corda", "loftq")


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """What scales adapters.

    Attributes:
      rank, alpha: of all modules.
      ranks, alphas: {pattern of a module's name: another value}.
      rooted: the scale is alpha / sqrt(rank) (rsLoRA).
      dora: there are magnitudes.
      base: what it calls its base.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alphas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    rooted: bool = False
    dora: bool = False
    base: str = ""

    def scale(self, module: str) -> float:
        """Factor of what an adapter adds.

        Args:
          module: name of the adapted module, from the model's root.
        """
        rank, alpha = _of(self.ranks, module, self.rank), _of(self.alphas, module, self.alpha)
        return alpha / (rank**0.5 if self.rooted else rank)

    def rank_of(self, module: str) -> int:
        """Rank of one module's adapter."""
        return _of(self.ranks, module, self.rank)


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT takes it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read(folder: Path) -> PeftConfig:
    """Reads `adapter_config.json`.

    Raises:
      UserError: not there, of another method, or of something that we do not have; names the field.
    """
    path = folder / FILE
    found = bounds.read_json(path)
    if not isinstance(found, dict) or found.get("peft_type") != "LORA":
        kind = found.get("peft_type") if isinstance(found, dict) else None
        what = f"is of the method {kind!r}, not 'LORA'"
        raise UserError(what, field=str(path), hint="Only LoRA and DoRA are read")
    for name in OFF:
        if found.get(name):
            raise UserError(f"{name} is set", field=str(path), hint="Adapters have none of it here")
    if found.get("bias", "none") != "none":
        what, hint = "bias trains, too", "Save the adapter with bias='none'"
        raise UserError(what, field=str(path), hint=hint)
    start = found.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGING):
        what = f"begins as {start!r}, which changes the base"
        raise UserError(what, field=str(path), hint="Let PEFT save it as a plain LoRA")
    return PeftConfig(
        rank=_number(path, "r", found.get("r"), int),
        alpha=_number(path, "lora_alpha", found.get("lora_alpha", 8), float),
        ranks=_numbers(path, "rank_pattern", found, int),
        alphas=_numbers(path, "alpha_pattern", found, float),
        rooted=bool(found.get("use_rslora")),
        dora=bool(found.get("use_dora")),
        base=str(found.get("base_model_name_or_path") or ""),
    )


def _number(path: Path, name: str, value: Any, kind: type) -> Any:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or (kind is int and (value != int(value) or value < 1)) or not value < 1e9:
        hint = "Give 1 or more" if kind is int else "Give a number"
        raise UserError(f"{name} is {value!r}"[:80], field=str(path), hint=hint)
    return kind(value)


def _numbers(path: Path, name: str, found: Mapping[str, Any], kind: type) -> dict[str, Any]:
    given = found.get(name) or {}
    if not isinstance(given, dict):
        raise UserError(f"{name} is no object", field=str(path), hint="Download it again")
    for pattern in given:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            what = f"{name} has {pattern[:60]!r}, no regular expression"
            raise UserError(what, field=str(path), hint="Correct it") from None
    return {p: _number(path, f"{name}[{p[:40]!r}]", v, kind) for p, v in given.items()}


def written(
    targets: list[str],
    rank: int,
    alpha: float,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    dora: bool,
    base: str,
) -> dict[str, Any]:
    """The configuration of an exported adapter.

    Args:
      targets: names that the adapted modules end with.
      rank, alpha: of most modules.
      ranks, alphas: {name of a module: another value}.
      dora: there are magnitudes.
      base: name of the base for PEFT.
    """
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(alphas),
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": dora,
        "use_rslora": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
