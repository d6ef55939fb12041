"""Schedulers from a published scheduler_config.json.

What the file leaves out has the default of its own class there, which differs between classes. An
option that is not computed here is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from xllm_jax.core import words
from xllm_jax.core.errors import UserError
from xllm_jax.models.outputs.schedulers import (
    EPSILON,
    VELOCITY,
    Ddim,
    DpmSolver,
    Euler,
    Pndm,
    Scheduler,
)

KINDS = {
    "pndm": ("PNDMScheduler", Pndm),
    "ddim": ("DDIMScheduler", Ddim),
    "euler": ("EulerDiscreteScheduler", Euler),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", DpmSolver),
}
"""{our name: (published class, ours)}."""
LEAST_SHARE = 1e-12  # of a picture in what is all but noise; Stable Diffusion has 0.005
SHARED = dict(
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    prediction_type=EPSILON,
    timestep_spacing="leading",
    steps_offset=0,
)
"""Defaults that the published classes share."""
CHOICES = dict(
    beta_schedule=("linear", "scaled_linear"),
    prediction_type=(EPSILON, VELOCITY),
    timestep_spacing=("leading", "linspace", "trailing"),
)


def parse(
    config: Mapping[str, Any], name: str = "", place: str = "scheduler_config.json"
) -> Scheduler:
    """A published scheduler_config.json.

    Args:
      config: its fields.
      name: another scheduler over the same schedule, a key of KINDS; '' takes the one it names.
      place: of the file, for errors.

    Raises:
      UserError: a scheduler, an option or a value that is not computed here; names the field.
    """
    if not isinstance(config, Mapping):
        hint = "It is a JSON object with _class_name; download it again"
        raise UserError("is no configuration of a scheduler", field=place, hint=hint)
    kind = _kind(config, name, place)
    values = {**SHARED, **kind.ONLY, **kind.DEFAULTS, **config}
    for option, wanted in {**kind.ONLY, "trained_betas": None}.items():
        if values[option] not in (wanted, str(wanted)):
            hint = f"Choose another scheduler: {', '.join(KINDS)}"
            what = f"is {words.shown(values[option])}, and only {wanted!r} is computed here"
            raise UserError(what, field=f"{place}: {option}", hint=hint)
    for option, known in CHOICES.items():
        if values[option] not in known:
            what = f"is {words.shown(values[option])}"
            raise UserError(what, field=f"{place}: {option}", hint=f"Known: {', '.join(known)}")
    _check_numbers(values, place)
    own: dict[str, Any] = {}
    if kind in (Pndm, Ddim):
        own["set_alpha_to_one"] = bool(values.get("set_alpha_to_one", False))
    if kind is Ddim:
        own["clip_range"] = values["clip_sample_range"] if values["clip_sample"] else np.inf
    if kind is DpmSolver:
        own["karras"] = bool(values["use_karras_sigmas"])
    made = kind(
        train_steps=values["num_train_timesteps"],
        beta_start=values["beta_start"],
        beta_end=values["beta_end"],
        beta_schedule=values["beta_schedule"],
        prediction=values["prediction_type"],
        spacing=values["timestep_spacing"],
        steps_offset=values["steps_offset"],
        **own,
    )
    if made.alphas()[-1] < LEAST_SHARE:
        what = "its betas leave nothing of a picture after the last step"
        raise UserError(what, field=place, hint="Correct it, or download it again")
    return made


def _kind(config: Mapping[str, Any], name: str, place: str) -> type[Scheduler]:
    if name:
        if name not in KINDS:
            hint = f"Choices: {', '.join(KINDS)}"
            raise UserError(
                f"unknown scheduler {words.shown(name)}", field="--scheduler", hint=hint
            )
        return KINDS[name][1]
    told = config.get("_class_name")
    found = next((kind for published, kind in KINDS.values() if published == told), None)
    if found is None:
        known = ", ".join(published for published, _ in KINDS.values())
        hint = f"Known are {known}; --scheduler takes another over the same schedule"
        raise UserError(f"is {words.shown(told)}", field=f"{place}: _class_name", hint=hint)
    return found


def _check_numbers(values: Mapping[str, Any], place: str) -> None:
    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    def positive(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 10**6

    good = dict(
        num_train_timesteps=whole(values["num_train_timesteps"])
        and 1 < values["num_train_timesteps"] <= 10**6,
        beta_start=positive(values["beta_start"]) and values["beta_start"] < 1,
        beta_end=positive(values["beta_end"]) and values["beta_end"] < 1,
        steps_offset=whole(values["steps_offset"]) and 0 <= values["steps_offset"] <= 10**6,
        clip_sample_range=positive(values.get("clip_sample_range", 1)),
    )
    for option, fine in good.items():
        if not fine:
            what = f"is {words.shown(values[option])}, which no schedule has"
            hint = "Correct it, or download it again"
            raise UserError(what, field=f"{place}: {option}", hint=hint)
