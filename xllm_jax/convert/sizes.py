"""Sizes of a network, read from a checkpoint's headers or from a SIZES row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from xllm_jax.assembly import networks
from xllm_jax.convert.files import Checkpoint
from xllm_jax.core import lookup, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params


def row(sizes: Mapping[str, Mapping[str, Any]], size: str, **known: Any) -> dict[str, Any]:
    """A row of SIZES: the named one, the one that fits what is known, or the published one.

    Args:
      sizes: a model file's SIZES.
      size: name of a row, '' when the user gave none.
      known: fields that headers tell, such as the width.

    Raises:
      UserError: no row of this name.
    """
    if size:
        return lookup.size_row(sizes, size, "--size")
    fits = [r for r in sizes.values() if all(r.get(key) == value for key, value in known.items())]
    return dict(fits[0]) if fits and known else lookup.size_row(sizes, "real", "--size")


def fitting(
    sizes: Mapping[str, Mapping[str, Any]], size: str, checkpoint: Checkpoint, **measured: Any
) -> dict[str, Any]:
    """The row of SIZES of a network without config.json: the named one, or the one that fits.

    Args:
      sizes: a model file's SIZES.
      size: name of a row, '' when the user gave none.
      checkpoint: for errors.
      measured: fields that the tensors show.

    Returns:
      the row with the measured fields in it.

    Raises:
      UserError: no row of this name, the named one has another size, or none fits: then the heads
        are told by nothing.
    """
    rows = [lookup.size_row(sizes, size, "--size")] if size else list(sizes.values())
    wrong = [{k: v for k, v in measured.items() if row.get(k, v) != v} for row in rows]
    fits = next((row for row, other in zip(rows, wrong) if not other), None)
    if fits is not None:
        return dict(fits) | measured
    if size:
        name, value = next(iter(wrong[0].items()))
        what = f"{size} has {name} {rows[0][name]}, the file {value}"
        raise UserError(what, field="--size", hint="Choose the size that fits the checkpoint")
    shown = ", ".join(f"{name} {value}" for name, value in measured.items())
    raise UserError(
        f"weights of {shown} are of no published size, and do not tell the number of heads",
        field=str(checkpoint.path),
        hint="Put config.json beside them, or give --size",
    )


def check_named(
    sizes: Mapping[str, Mapping[str, Any]], size: str, found: Mapping[str, Any]
) -> None:
    """Refuses a size that config.json or the tensors contradict.

    Args:
      sizes: a model file's SIZES.
      size: name of a row, '' when the user gave none.
      found: fields of the network, as the checkpoint tells them.

    Raises:
      UserError: no row of this name, or it has another value of a field.
    """
    named = rules.flatten(lookup.size_row(sizes, size, "--size")) if size else {}
    found = rules.flatten(dict(found))
    for name, value in named.items():
        if (found.get(name, value) or None) != (value or None):  # no pools: () or []
            what = f"{size} has {name} {value}, the checkpoint {found[name]}"
            raise UserError(what, field="--size", hint="Leave it out: config.json tells the sizes")


def axis(checkpoint: Checkpoint, name: str, number: int) -> int:
    """Length of one axis of a tensor.

    Raises:
      UserError: no such tensor, or fewer axes.
    """
    if name not in checkpoint:
        raise UserError(
            "the checkpoint has no such tensor",
            field=checkpoint.where(name),
            hint="Check the file, and that its kind is the one you named",
        )
    shape = checkpoint.header(name).shape
    if not -len(shape) <= number < len(shape):
        raise UserError(
            f"has shape {shape}, which is not that of this weight",
            field=checkpoint.where(name),
            hint="The checkpoint is of another architecture",
        )
    return shape[number]


def depth(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern`'s group finds in whole names; 0 for none."""
    found = [int(match[1]) for name in names if (match := re.fullmatch(pattern, name))]
    return max(found, default=-1) + 1


def shapes_of(model: Any, *inputs: jax.typing.ArrayLike) -> Params:
    """Shapes of a network's parameters, without computing them.

    Args:
      model: the network.
      inputs: arrays of the shapes that it takes; by default those of its example.
    """
    if not inputs:
        return networks.shapes_of(model)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
