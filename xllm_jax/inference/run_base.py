"""The bases under a finished run: what it was trained on, and the same LLM in other weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from xllm_jax.assembly import adapter_source, packed_weights, parameters
from xllm_jax.core import base_description, checkpoint
from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.core.stage import Part, Stage
from xllm_jax.models import lora, quantized
from xllm_jax.models.xllm import LLM

FLOATS = "floats"


def packed_as(part: Part, name: str, source: str) -> Part:
    """A part with its kernels packed as they are in what replaces its parameters.

    Args:
      part: of a stage.
      name: of the part.
      source: 'DIR' or 'DIR:part'; '' where nothing does.
    """
    return dataclasses.replace(part, weights=_packing(source, name)) if source else part


def _packing(source: str, part: str) -> str:
    folder, inner = parameters.origin(source, part)
    about = base_description.base_about(folder)
    return about.get("weights", {}).get(inner) or packed_weights.kind_of(about["shapes"], inner)


def _codes(weights: str) -> str:
    return quantized.KINDS[weights].codes if weights else FLOATS


def check_packing(stage: Stage, directory: str | Path) -> None:
    """Looks whether the parts that a run was trained on are packed as they were then.

    Args:
      stage: of the run, its sources resolved.
      directory: of the run, for the error.

    Raises:
      UserError: one is not; says what was expected and what was found where.
    """
    for name, part in stage.parts.items():
        source = stage.init.get(name, "")
        folder = parameters.origin(source, name)[0] if source else Path()
        if not source or not checkpoint.base_exists(folder):
            continue  # which loading tells
        have, wanted = _codes(_packing(source, name)), _codes(part.weights)
        if have != wanted:
            what = f"was trained on {name} in {wanted}, and {folder} holds {have}"
            other = ", or name another place of it in --base" if name == LLM else ""
            hint = f"Bring the {name} back that it was trained on{other}"
            raise UserError(what, field=str(directory), hint=hint)


@contextlib.contextmanager
def told_of_run(directory: str | Path) -> Iterator[None]:
    """Errors about fields of a stage become errors about a run, whose stage nobody can change."""
    try:
        yield
    except CannotWrite:
        raise
    except UserError as error:
        fields = ("parts.", "init.", "lora.")
        if not error.field.startswith(fields) and not any(n in error.hint for n in fields):
            raise
        what = f"is not over what it was trained on: {error.field}: {error.what}"
        why, _, advice = error.hint.partition(";")
        why = f"{why}. " if advice and not any(name in why for name in fields) else ""
        hint = f"{why}Bring that back; --base names another place of the LLM's base"
        raise UserError(what, field=str(directory), hint=hint) from error


@dataclasses.dataclass(frozen=True)
class OtherBase:
    """A base that stands in for the one that a run's LLM was trained on.

    Attributes:
      folder: of the base.
      adapters: folder of the LLM's adapters; None without any.
      same: whether it is packed as the run's own base, so that every value can be compared.
    """

    folder: str
    adapters: Path | None
    same: bool


def other_base(stage: Stage, directory: str | Path, base: str) -> OtherBase:
    """Looks whether a base is of the LLM that a run was trained on, packed or not.

    Args:
      stage: of the run, its sources resolved.
      directory: the run's result.
      base: folder of the base.

    Raises:
      UserError: the run has no LLM or trained it, the folder is none of an LLM, or it was made of
        other floats.
    """
    field, about = f"--base={base}", base_description.base_about(directory)
    if LLM not in stage.parts:
        raise UserError("the run has no llm", field=field, hint="Leave it out")
    inside = parameters.below(LLM, about["shapes"])
    if inside and not all(map(lora.is_adapter, inside)):
        what = f"the run trained its own llm, which is in {directory}"
        raise UserError(what, field=field, hint="Leave it out")
    if not checkpoint.base_exists(base):
        hint = "Give a folder of xllm quantize or xllm convert"
        raise UserError("no base here", field=field, hint=hint)
    told = base_description.base_about(base)
    if not parameters.below(LLM, told["shapes"]):
        raise UserError("holds no llm", field=field, hint="Give the LLM's base")
    have, wanted = _packing(base, LLM), stage.parts[LLM].weights
    same = _codes(have) == _codes(wanted)
    if not same:
        _check_kernels(stage, directory, base, field)
    return OtherBase(base, adapter_source.holder(directory, LLM), same)


def _check_kernels(stage: Stage, directory: str | Path, base: str, field: str) -> None:
    """By the hashes of kernels, which a packed base has of the floats that it was made of."""
    ours = adapter_source.kernels_in(Path(base), LLM)
    theirs: Mapping[str, str] = adapter_source.known_kernels(
        base_description.base_about(directory), LLM
    )
    source = stage.init.get(LLM, "")
    own = parameters.origin(source, LLM)[0] if source else Path()
    if source and checkpoint.base_exists(own):
        theirs = {**adapter_source.kernels_in(own, LLM), **theirs}
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        what = "nothing tells of which floats it was made" if theirs else f"{own} is gone"
        if theirs:
            hint = "Give a base of xllm quantize"
        else:
            hint = "Bring it back, so that the two can be compared, or train again"
        raise UserError(what, field=field, hint=hint)
    for path in common:
        if ours[path] != theirs[path]:
            what = f"is of another llm than {directory} was trained on: {path} has other values"
            raise UserError(what, field=field, hint="Give that base, or one that was made of it")
