"""Published checkpoints to bases and back, tensor by tensor: what launch/convert.py runs.

A source is a module of `sources/` that has `recognize`, `options` and `plan` (and `prepare`,
where its tensors are to be computed first, such as quantized ones):

    recognize(checkpoint) -> bool              from names, headers and config.json
    options(checkpoint | None, size) -> dict   all that the table depends on, as JSON
    options_of(base) -> dict                   the same, from a base that has no conversion.json
    plan(options) -> ConversionPlan                      table, shapes, what may be dropped or fresh
    prepare(checkpoint, options) -> Mapping    a view of the tensors that the table names

`options` go into conversion.json, from which export finds the way back.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from xllm_jax.convert import (
    ConversionPlan,
    Drop,
    Leaf,
    Report,
    arrange,
    conversion_record,
    files,
    place,
    wrapped_names,
)
from xllm_jax.core import bounded, checkpoint, damage, limits, litter, lookup, rules
from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.core.streamed_leaf import Blocks

PACKAGE = "xllm_jax.convert.sources"
BLOCK = 1 << 26
"""Bytes that are written at once."""

FLOATS = ("float16", "bfloat16", "float32")
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
"""Bits that are all set in infinities and NaNs only."""


def sources() -> dict[str, ModuleType]:
    """The modules that describe a source, by name."""
    modules = {
        name: importlib.import_module(f"{PACKAGE}.{name}") for name in lookup.choices(PACKAGE)
    }
    return {name: module for name, module in modules.items() if hasattr(module, "recognize")}


def source_named(name: str) -> ModuleType:
    """The module of a source.

    Raises:
      UserError: there is none of this name.
    """
    known = sources()
    if name not in known:
        raise UserError(
            f"unknown source {name!r}", field="--source", hint=f"Choices: {', '.join(known)}"
        )
    return known[name]


def check_kind(name: str, opened: files.Checkpoint) -> None:
    """Refuses a checkpoint of another source by its name.

    Raises:
      UserError: tells what the checkpoint looks like.
    """
    known = sources()
    if known[name].recognize(opened):
        return
    like = [
        other
        for other, module in known.items()
        if module.recognize(wrapped_names.unwrapped(opened, module.recognize))
    ]
    raise UserError(
        f"this looks like {' or '.join(like)}, not {name}" if like else f"this is no {name}",
        field=str(opened.path),
        hint=f"Say --source={like[0]}" if like else "None of the sources knows these tensor names",
    )


def run_import(
    source: str,
    path: str | Path,
    output: str | Path,
    size: str = "",
    keep_packed: bool = False,
) -> conversion_record.Conversion:
    """Converts a published checkpoint into a base, with conversion.json beside it.

    Args:
      source: name of the source.
      path: the published file or folder.
      output: folder of the base; a base that stands there is replaced.
      size: row of SIZES, where the files do not tell.
      keep_packed: integer weights stay integers, where the source has a table for them.

    Raises:
      UserError: the files are not what was said, damaged or incomplete; not enough room. Nothing is
        left of the output then.
    """
    found = examine(source, path, size, keep_packed=keep_packed)
    check_output(output, found.opened.path)
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in found.leaves.values()]
    check_room(output, sum(sizes))
    written = conversion_record.Conversion.of(
        source, found.options, found.plan, found.opened, found.tensors, found.report
    )

    def finish(folder: Path) -> None:
        copy_extra_files(found.plan, found.opened.path, folder)
        written.write(folder)

    blocks = {path: as_blocks(path, leaf) for path, leaf in found.leaves.items()}
    about = {"source": f"{source} {Path(path).name}"}
    checkpoint.save_base(output, rules.unflatten(blocks), about, finish)
    return written


@dataclasses.dataclass(frozen=True)
class Examined:
    """A published checkpoint that fits its table; its tensors are still in their files."""

    opened: files.Checkpoint
    options: Mapping[str, Any]
    plan: ConversionPlan
    tensors: Mapping[str, np.ndarray]
    leaves: Mapping[str, Leaf]
    report: Report

    def tree(self) -> dict[str, Any]:
        """Reads all of it: {part: tree of NumPy arrays in the file's dtype}."""
        return rules.unflatten({path: leaf.whole() for path, leaf in self.leaves.items()})


def examine(
    source: str,
    path: str | Path,
    size: str = "",
    options: Mapping[str, Any] | None = None,
    keep_packed: bool = False,
) -> Examined:
    """Opens a published checkpoint and makes every check that needs no weights.

    Args:
      source: name of the source.
      path: the published file or folder.
      size: row of SIZES, where the files do not tell.
      options: of the source's plan, where neither the files nor SIZES tell them.
      keep_packed: see `run_import`.

    Raises:
      UserError: the files are not what was said, or are incomplete.
    """
    module = source_named(source)
    opened = wrapped_names.unwrapped(files.open_checkpoint(path), module.recognize)
    check_kind(source, opened)
    with damage.reading(opened.path):  # a configuration may say anything
        options = module.options(opened, size) if options is None else options
        limits.check_network(options, str(opened.path))
        if keep_packed:
            if not hasattr(module, "packed_options"):
                what = f"{source} has no integer weights to keep"
                raise UserError(what, field="--keep_packed", hint="Leave it out; see xllm quantize")
            options = module.packed_options(options, opened)
        plan = module.plan(options)
        prepare = getattr(module, "prepare", None)
        tensors = prepare(opened, options) if prepare else opened
    leaves, report = laid_out(plan, tensors)
    return Examined(opened, options, plan, tensors, leaves, report)


def laid_out(
    plan: ConversionPlan, tensors: Mapping[str, np.ndarray]
) -> tuple[dict[str, Leaf], Report]:
    """What fills each leaf, every check that headers allow, and the tied tensors compared.

    Raises:
      UserError: names file and tensor.
    """
    tied = {name: other for name, other in plan.tied.items() if name in tensors}
    rows = {name for row in plan.table for name in row.names()}
    drop = [Drop(re.escape(name), f"repeats {other}") for name, other in tied.items()]
    leaves, report = arrange(
        plan.table,
        tensors,
        plan.shapes,
        drop=(*drop, *plan.drop, *wrapped_names.DROP),
        fresh=plan.fresh,
    )
    for name in sorted(rows):
        if tensors.header(name).dtype.name not in FLOATS and name not in plan.integers:
            raise UserError(
                f"is {tensors.header(name).dtype}, weights are {', '.join(FLOATS)}",
                field=place(tensors, name),
                hint="Give the published file",
            )
    for name, other in tied.items():
        check_tied(tensors, name, other)
    return leaves, dataclasses.replace(report, dropped=report.dropped | idle(plan, tensors))


def idle(plan: ConversionPlan, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """{'NAME, part 2 of 3': reason} of pieces that are not zero, change nothing and are dropped.

    Raises:
      UserError: such a piece holds NaN or infinities; names file and tensor.
    """
    found = {}
    for row in plan.table:
        for name in row.names() if row.idle and row.piece else ():
            tensor = np.asarray(tensors[name])
            check_finite(tensor, place(tensors, name))
            pieces = np.split(tensor, row.piece[1])
            found |= {
                f"{name}, part {zero + 1} of {row.piece[1]}": row.idle
                for zero in row.zero_pieces
                if np.any(pieces[zero])
            }
    return found


def check_tied(tensors: Mapping[str, np.ndarray], name: str, other: str) -> None:
    """Compares two tensors bit by bit, a block at a time.

    Raises:
      UserError: they differ.
    """
    one, two = tensors[name], tensors[other]
    same = one.shape == two.shape and one.dtype == two.dtype
    if not same or not all(
        first.tobytes() == second.tobytes()
        for first, second in zip(pieces(one), pieces(two), strict=True)
    ):
        raise UserError(
            f"differs from {other}, to which it is tied",
            field=place(tensors, name),
            hint="The model's code overwrites one by the other, so this file is damaged or not it",
        )


def as_blocks(path: str, leaf: Leaf) -> Blocks:
    """A leaf as the blocks in which it is written: some of its layers, or some of its rows."""
    one = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize if leaf.shape else leaf.dtype.itemsize
    rows = max(1, min(BLOCK // max(one, 1), leaf.shape[0] if leaf.shape else 1))

    def blocks() -> Iterator[np.ndarray]:
        held: list[np.ndarray] = []
        for name, layer in zip(leaf.row.names(), leaf.layers()):
            check_finite(layer, place(leaf.source, name))
            if leaf.row.layers is None:
                yield from (
                    (layer[i : i + rows] for i in range(0, len(layer), rows))
                    if (layer.ndim)
                    else (layer,)
                )
                return
            held.append(layer)
            if len(held) == rows:
                yield np.stack(held) if rows > 1 else held[0][None]
                held = []
            del layer  # lets go of the mapped file before the next tensor is opened
        if held:
            yield np.stack(held)

    return Blocks(path, leaf.shape, leaf.dtype, rows, blocks)


def pieces(tensor: np.ndarray) -> Iterator[np.ndarray]:
    """The tensor in blocks along its first axis, as views."""
    if not tensor.ndim:
        yield tensor
        return
    rows = max(1, (BLOCK >> 3) * len(tensor) // max(tensor.nbytes, 1))
    yield from (tensor[start : start + rows] for start in range(0, len(tensor), rows))


def check_finite(tensor: np.ndarray, name: str) -> None:
    """Refuses NaN and infinities.

    Raises:
      UserError: names file and tensor.
    """
    if tensor.dtype.kind in "iu":
        return
    exponent = EXPONENTS[tensor.dtype.name]
    bits = np.dtype(f"u{tensor.dtype.itemsize}")
    for piece in pieces(tensor):
        high = np.ascontiguousarray(piece).view(bits) & bits.type(exponent)
        if (high == exponent).any():
            raise UserError(
                "holds NaN or infinite values",
                field=name,
                hint="The file is damaged, or the model had diverged; download it again",
            )


def check_output(output: str | Path, *sources: str | Path) -> None:
    """Refuses an output folder that holds something else than a base, or what is read.

    Args:
      output: folder to write.
      sources: files and folders that are read.

    Raises:
      UserError: it would be overwritten.
    """
    output = Path(output)
    filled = output.is_file() or (output.is_dir() and litter.filled(output))
    own = output.resolve()
    for source in (Path(one).resolve() for one in sources):
        if own == source or own in source.parents or (filled and source in own.parents):
            what = "is the input" if own == source else f"holds, or is a part of, {source}"
            raise UserError(what, field=str(output), hint="Choose another --output")
    if filled and not (output / "about.json").exists():
        raise UserError(
            "is there already and is no base of ours",
            field=str(output),
            hint="Choose another --output",
        )


def check_new(output: str | Path) -> None:
    """Refuses an output folder in which anything is, a base of ours too.

    Args:
      output: folder to write.

    Raises:
      UserError: it would be overwritten.
    """
    output = Path(output)
    if output.is_file() or (output.is_dir() and litter.filled(output)):
        hint = "Choose another --output, or remove it first"
        raise UserError("is there already", field=str(output), hint=hint)


def check_room(output: str | Path, needed: int) -> None:
    """Refuses to start what the disk cannot hold; `needed` in bytes, before compression.

    Raises:
      CannotWrite: tells how much is missing.
    """
    folder = Path(output).absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        reason = f"needs {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free"
        raise CannotWrite(str(output), reason, "Nothing was begun")


def copy_extra_files(plan: ConversionPlan, source: Path, target: Path) -> None:
    """Copies the plan's further files (tokenizer, configuration) from one folder to the other.

    Raises:
      UserError: one is a link that leaves the folder, which nobody wants to publish by accident,
        or too large for such a file.
    """
    folder = source if source.is_dir() else source.parent
    for name, new in ({name: name for name in plan.extra_files} | dict(plan.moved_files)).items():
        if (folder / name).is_file():
            check_own(folder / name, folder)
            bounded.look(folder / name)
            (target / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target / new)


def check_own(file: Path, folder: Path) -> None:
    """Raises UserError for a file of a folder that lies elsewhere in truth.

    Hugging Face's cache has files of `snapshots/REVISION` beside them, in `blobs`.
    """
    home, place = folder.resolve(), file.resolve()
    blobs = [home.parent.parent / "blobs"] if home.parent.name == "snapshots" else []
    if not any(place.is_relative_to(one) for one in (home, *blobs)):
        what, hint = f"is a link to {place}", "Put the file itself there, or remove it"
        raise UserError(what, field=str(file), hint=hint)
