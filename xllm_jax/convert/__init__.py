"""The conversion engine: published checkpoints to our parameter trees and back.

A source is described by a table of rows, and nothing else. A row names one source tensor, one leaf
of ours, and the rearrangement between them in einops' notation with the source on the left, such as
``'(h k) d -> d h k'``. Rows that carry `layers` stand for one source tensor per layer, stacked on a
new leading axis of our leaf. The way back follows by reading the arrow backwards, so that export
needs no table of its own. Every source tensor is used exactly once or named as dropped with its
reason; every leaf of ours is filled or named as fresh.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Row:
    """One source tensor (or one per layer) and the leaf of ours that it fills.

    Attributes:
      source: name in the published file; `{layer}` is replaced by each number of `layers`.
      target: path of our leaf, such as 'layers/attention/query/kernel'.
      pattern: einops rearrangement, source on the left; '' keeps the tensor as it is.
      layers: source layer numbers in stacking order; None for a tensor without layers.
      sizes: axis lengths that einops cannot infer, as (axis, length) pairs.
      piece: (number, of): this leaf is that piece of the source split evenly along axis 0. All the
        pieces of one source must be in the table, or in `zero_pieces`.
      zero_pieces: pieces of the same source that are zero by construction and have no leaf (EVA's
        key bias); checked on import, written as zeros on export.
      idle: why other values in `zero_pieces` change nothing; they are dropped with this reason. ''
        refuses them.
    """

    source: str
    target: str
    pattern: str = ""
    layers: tuple[int, ...] | None = None
    sizes: tuple[tuple[str, int], ...] = ()
    piece: tuple[int, int] | None = None
    zero_pieces: tuple[int, ...] = ()
    idle: str = ""

    def names(self) -> list[str]:
        """Source tensor names of this row, in stacking order."""
        if self.layers is None:
            return [self.source]
        return [self.source.replace("{layer}", str(layer)) for layer in self.layers]

    def forward(self, tensor: np.ndarray, name: str = "") -> np.ndarray:
        """One source tensor to one (layer of a) leaf; `name` is the tensor's, for errors."""
        if self.piece:
            tensor = self._take_piece(tensor, name or self.source)
        return rearrange(tensor, self.pattern, **dict(self.sizes)) if self.pattern else tensor

    def backward(self, leaf: np.ndarray) -> np.ndarray:
        """One (layer of a) leaf to one source tensor, or to its piece of one."""
        if not self.pattern:
            return leaf
        left, right = self.pattern.split("->")
        return rearrange(leaf, f"{right} -> {left}", **dict(self.sizes))

    def _take_piece(self, tensor: np.ndarray, name: str) -> np.ndarray:
        number, count = self.piece
        if tensor.shape[0] % count:
            raise UserError(
                f"first axis of {tensor.shape} does not divide into {count}",
                field=name,
                hint="The checkpoint is of another architecture or size",
            )
        pieces = np.split(tensor, count)
        for zero in self.zero_pieces:
            if not self.idle and np.any(pieces[zero]):
                raise UserError(
                    f"piece {zero} of {count} must be zero and is not",
                    field=name,
                    hint="This is not the architecture that the table describes",
                )
        return pieces[number]


@dataclasses.dataclass(frozen=True)
class Drop:
    """Source tensors (regular expression on the whole name) that are left out, and why."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What an import did: {source name: target path}, {dropped name: reason}, fresh paths."""

    used: dict[str, str]
    dropped: dict[str, str]
    fresh: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ConversionPlan:
    """What one source is, in all: the facts that the command needs.

    Attributes:
      table: rows; their targets start with the part, such as 'llm/layers/attention/qkv/kernel'.
      shapes: {part: tree of anything with `.shape`}.
      drop: source tensors that may stay unused.
      fresh: path patterns of our leaves that the source does not hold.
      tied: {name: other name}: tensors that repeat another one bit by bit. They are compared on
        import and written again on export.
      extra_files: files of the input folder that are copied into the output where they exist.
      fields: {part: {field of its network: value}} that the parameters were made for, where a shape
        does not show it and the network has another value by default.
      moved_files: {further file of the input: where it lies in the base and in an export}.
      integers: source tensors that may be integers, packed weights; others are floats.
      weight_files: {what tensors' names begin with: path of the exported file of those, which have
        the rest as their names there}, without its ending.
      written_files: {file of an export: makes its text from the exported folder}, in this order,
        where the base brings none.
    """

    table: tuple[Row, ...]
    shapes: Mapping[str, Any]
    drop: tuple[Drop, ...] = ()
    fresh: tuple[str, ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    extra_files: tuple[str, ...] = ()
    fields: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    moved_files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    integers: frozenset[str] = frozenset()
    weight_files: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"": "model"})
    written_files: Mapping[str, Callable[[Path], str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of ours that is still in its file: shape and dtype are known, nothing is read.

    Attributes:
      row: how it is made.
      source: the opened checkpoint.
      shape: in our layout, stacked layers included.
      dtype: the source's.
    """

    row: Row
    source: Mapping[str, np.ndarray]
    shape: tuple[int, ...]
    dtype: np.dtype

    def layers(self) -> Iterator[np.ndarray]:
        """Reads and rearranges one source tensor after the other."""
        for name in self.row.names():
            yield _convert(self.row, place(self.source, name), np.asarray(self.source[name]))

    def whole(self) -> np.ndarray:
        """Reads all of it."""
        return next(self.layers()) if self.row.layers is None else np.stack(list(self.layers()))


def mount(part: str, table: Iterable[Row]) -> tuple[Row, ...]:
    """The rows with `part` in front of their targets."""
    return tuple(dataclasses.replace(row, target=f"{part}/{row.target}") for row in table)


def place(source: Mapping[str, Any], name: str) -> str:
    """How errors call a tensor: 'FILE: NAME' where the source knows its files."""
    where = getattr(source, "where", None)
    return where(name) if where else name


def arrange(
    table: Iterable[Row],
    source: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    *,
    drop: Iterable[Drop] = (),
    fresh: Iterable[str] = (),
) -> tuple[dict[str, Leaf], Report]:
    """Finds for each leaf of ours what fills it, from names, shapes and dtypes alone.

    Arguments and errors are those of `import_tree`; a source with `header(name)` is not read.
    """
    table, flat = tuple(table), rules.flatten(shapes)
    check_table(table)
    available = set(source.keys())
    leaves = {row.target: _find(row, source, available, flat) for row in table}
    used = {name: row.target for row in table for name in row.names()}
    dropped = {n: _reason(source, n, drop) for n in sorted(available - used.keys())}
    left = tuple(path for path in flat if path not in leaves)
    for path in left:
        if not any(re.fullmatch(pattern, path) for pattern in fresh):
            raise UserError(
                "no tensor of the checkpoint fills this parameter",
                field=path,
                hint="Check that the checkpoint is of the kind and size you named",
            )
    return leaves, Report(used, dropped, left)


def import_tree(
    table: Iterable[Row],
    source: Mapping[str, np.ndarray],
    shapes: Mapping[str, Any],
    *,
    drop: Iterable[Drop] = (),
    fresh: Iterable[str] = (),
) -> tuple[dict[str, Any], Report]:
    """Fills our tree from the tensors of a published checkpoint.

    Args:
      table: rows of the source.
      source: {tensor name: array}; read one at a time, so a lazy mapping saves memory.
      shapes: our tree of anything with `.shape` (`jax.eval_shape` gives it).
      drop: source tensors that are allowed to stay unused.
      fresh: path patterns of our leaves that the source does not hold.

    Returns:
      (tree of NumPy arrays in the source's dtype without the fresh leaves, report).

    Raises:
      UserError: a tensor that is missing, unknown, misshapen or of another dtype than its layer's
        neighbors; a leaf that nothing fills.
      ValueError: the table itself is wrong: a leaf is filled twice, or a source is used twice
        without being split, or some of its pieces are used by nobody.
    """
    leaves, report = arrange(table, source, shapes, drop=drop, fresh=fresh)
    return rules.unflatten({path: leaf.whole() for path, leaf in leaves.items()}), report


def export_tree(table: Iterable[Row], tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Writes our tree under the source's names and shapes; the inverse of `import_tree`.

    Tensors are in C order: safetensors' NumPy writer takes the bytes of any other as they lie.
    """
    flat = rules.flatten(tree)
    tensors: dict[str, np.ndarray] = {}
    pieces: dict[str, dict[int, np.ndarray]] = {}
    for row in table:
        leaf = np.asarray(flat[row.target])
        for name, layer in zip(row.names(), leaf if row.layers is not None else [leaf]):
            tensor = row.backward(layer)
            if not row.piece:
                tensors[name] = np.asarray(tensor, order="C")  # keeps scalars scalar
                continue
            parts = pieces.setdefault(name, {})
            parts[row.piece[0]] = tensor
            parts.update({zero: np.zeros_like(tensor) for zero in row.zero_pieces})
    for name, parts in pieces.items():
        whole = np.concatenate([parts[number] for number in sorted(parts)])
        tensors[name] = np.asarray(whole, order="C")
    return tensors


def check_table(table: tuple[Row, ...]) -> None:
    """Raises ValueError unless each target is filled once and each source used once.

    A source in pieces is used once when each piece is, or is zero by construction.
    """
    targets: set[str] = set()
    taken: dict[str, set[tuple[int, int]]] = {}
    zeros: dict[str, set[tuple[int, int]]] = {}
    for row in table:
        if row.target in targets:
            raise ValueError(f"two rows fill {row.target}")
        targets.add(row.target)
        piece = row.piece or (0, 1)
        for name in row.names():
            if piece in taken.setdefault(name, set()):
                raise ValueError(f"two rows use {name}")
            taken[name].add(piece)
            zeros.setdefault(name, set()).update((zero, piece[1]) for zero in row.zero_pieces)
    for name, pieces in taken.items():
        count = next(iter(pieces))[1]
        if pieces & zeros[name] or pieces | zeros[name] != {(n, count) for n in range(count)}:
            raise ValueError(f"the rows do not use each of {count} pieces of {name} once")


def _find(
    row: Row, source: Mapping[str, np.ndarray], available: set[str], flat: Mapping[str, Any]
) -> Leaf:
    if row.target not in flat:
        raise ValueError(f"the table fills {row.target}, which the model does not have")
    wanted, dtype = tuple(flat[row.target].shape), None
    for name in row.names():
        if name not in available:
            raise UserError(
                "the checkpoint has no such tensor",
                field=place(source, name),
                hint="Check the file, and that its kind and size are the ones you named",
            )
        layer = _convert(row, place(source, name), _outline(source, name))
        whole = layer.shape if row.layers is None else (len(row.layers), *layer.shape)
        if whole != wanted:
            raise UserError(
                f"shape {whole} in our layout, but {row.target} needs {wanted}",
                field=place(source, name),
                hint="The checkpoint is of another size; choose the size that fits it",
            )
        if dtype is not None and layer.dtype != dtype:
            raise UserError(
                f"is {layer.dtype}, but {row.names()[0]} is {dtype}",
                field=place(source, name),
                hint="Store all layers in one dtype",
            )
        dtype = layer.dtype
    return Leaf(row, source, wanted, dtype)


def _outline(source: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """An array of the tensor's shape and dtype; zeros without memory where headers tell them."""
    header = getattr(source, "header", None)
    if header is None:
        return np.asarray(source[name])
    return np.broadcast_to(np.zeros((), header(name).dtype), header(name).shape)


def _convert(row: Row, name: str, tensor: np.ndarray) -> np.ndarray:
    try:
        return row.forward(tensor, name)
    except UserError:
        raise
    except Exception as error:  # einops reports every mismatch as its own error type
        raise UserError(
            f"shape {tensor.shape} does not fit the pattern {row.pattern!r}",
            field=name,
            hint="The checkpoint is of another architecture or size",
        ) from error


def _reason(source: Mapping[str, Any], name: str, drop: Iterable[Drop]) -> str:
    for rule in drop:
        if re.fullmatch(rule.pattern, name):
            return rule.reason
    raise UserError(
        "the checkpoint holds a tensor that no row of the table uses",
        field=place(source, name),
        hint="Check that the checkpoint is of the kind you named",
    )
