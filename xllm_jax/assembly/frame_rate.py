"""Whether a speech interface goes on with features of the rate that it has learnt from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from xllm_jax.assembly import fit, networks
from xllm_jax.assembly.system import System
from xllm_jax.core import base_description
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part
from xllm_jax.data.media import speech

HOP = 1000 * speech.HOP // speech.RATE  # milliseconds of a frame of the filterbank


def check(system: System, place: Path, prefix: str) -> None:
    """Compares the encoder before an interface with the one of the run that it comes from.

    Args:
      system: whose parameters are loaded.
      place: folder of the run, or of a base, which tells no rate.
      prefix: of the subtree that comes from there.

    Raises:
      UserError: the features of the two have other rates; names what mends it.
    """
    part = prefix.partition("/")[0]
    rows = [row for row in fit.routes(system.stage, system.model) if row[2] == part]
    for _, encoder, _ in rows:
        now: int | None = getattr(system.model.networks[encoder], "reduction", None)
        then = _reduction(system, place, encoder) if now else None
        if now and then and then != now:
            what = f"gives a feature every {HOP * now} ms, and {place} learnt from {HOP * then} ms"
            hint = f"Say the fields of its {encoder}, such as 'stride' of Whisper"
            raise UserError(what, field=f"parts.{encoder}", hint=hint)


def _reduction(system: System, place: Path, encoder: str) -> int | None:
    """Frames in a feature of a run's encoder; None where nothing tells."""
    told = base_description.base_about(place).get("stage", {})
    parts = told.get("parts", {}) if isinstance(told, dict) else {}
    known = {field.name for field in dataclasses.fields(Part)}
    part = parts.get(encoder)
    if not isinstance(part, dict) or not part.keys() <= known:
        return None
    try:
        made = networks.network(Part(**part), system.stage, encoder)
    except UserError:  # of a package that is not here, or an older one
        return None
    return getattr(made, "reduction", None)
