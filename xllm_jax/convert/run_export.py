"""Our bases back to safetensors under the published names, tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from xllm_jax.convert import ConversionPlan, Row, check_table, conversion_record, run_import
from xllm_jax.convert.base_sizes import Base, check_kernel
from xllm_jax.convert.header import Header
from xllm_jax.convert.safetensors_file import SAFETENSORS
from xllm_jax.core import atomic, checkpoint, damage, limits, rules
from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.core.new_folder import new_folder
from xllm_jax.models import lora

COMPARED = ("width", "depth", "heads", "hidden")
SHARD = 4 << 30
"""Largest file in bytes, unless one tensor is larger."""


class Exported(Mapping):
    """The tensors of a plan, under the source's names, each read from our leaves when asked for.

    Args:
      plan: of the source.
      leaves: {path: store} of `checkpoint.open_leaves`.
      base: folder they lie in, for errors.

    Raises:
      UserError: a leaf is missing or has another shape than the plan's.
    """

    def __init__(self, plan: ConversionPlan, leaves: Mapping[str, Any], base: Path):
        check_table(plan.table)
        self._plan, self._leaves = plan, leaves
        self._places: dict[str, list[_Place]] = {}
        for row in plan.table:
            if row.target not in leaves:
                check_kernel(row.target, leaves, base)
                raise UserError(
                    "the base lacks this parameter",
                    field=f"{base}: {row.target}",
                    hint="Check that --source and --size are what the base was made from",
                )
            for number, name in enumerate(row.names()):
                layer = None if row.layers is None else number
                self._places.setdefault(name, []).append(_Place(row, layer))
        for name, other in plan.tied.items():
            self._places[name] = self._places[other]

    def header(self, name: str) -> Header:
        """Shape and dtype; reads nothing."""
        outline = self._make(name, self._outline)
        return Header(outline.shape, outline.dtype)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._make(name, self._read)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _make(self, name: str, get: Callable[[_Place], np.ndarray]) -> np.ndarray:
        parts: dict[int, np.ndarray] = {}
        for spot in self._places[name]:
            tensor = spot.row.backward(get(spot))
            if not spot.row.piece:
                return np.asarray(tensor, order="C")
            parts[spot.row.piece[0]] = tensor
            parts.update({zero: np.zeros_like(tensor) for zero in spot.row.zero_pieces})
        return np.concatenate([parts[number] for number in sorted(parts)])

    def _read(self, spot: _Place) -> np.ndarray:
        store = self._leaves[spot.row.target]
        return np.asarray((store if spot.layer is None else store[spot.layer]).read().result())

    def _outline(self, spot: _Place) -> np.ndarray:
        store = self._leaves[spot.row.target]
        shape = tuple(store.shape) if spot.layer is None else tuple(store.shape)[1:]
        return np.broadcast_to(np.zeros((), store.dtype.numpy_dtype), shape)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one source tensor, or one piece of it, stands in our leaves."""

    row: Row
    layer: int | None


def check_adapters(plan: ConversionPlan, leaves: Mapping[str, Any], base: Path) -> None:
    """Refuses adapters beside exported kernels where the layout has no place for them.

    Args:
      plan: of the source.
      leaves: {path: leaf} of the base.
      base: its folder.

    Raises:
      UserError: there are some.
    """
    targets = {row.target for row in plan.table}
    parts = {target.partition("/")[0] for target in targets}
    found = (path for path in leaves if lora.is_adapter(path) and path not in targets)
    low = next((path for path in found if path.partition("/")[0] in parts), None)
    if low:
        hint = "xllm adapter --action=merge writes them into the kernels"
        raise UserError(f"has adapters beside its kernels: {low}", field=str(base), hint=hint)


def run_export(source: str, path: str | Path, output: str | Path, size: str = "") -> list[str]:
    """Writes a base as safetensors under the published names, in files of at most 4 GiB.

    Args:
      source: name of the source.
      path: folder of the base; its conversion.json, where it has one, tells the layout.
      output: folder to write; must not exist, or be empty.
      size: row of SIZES that the base must be of; '' takes the sizes that its parameters tell.

    Returns:
      names of the weight files.

    Raises:
      UserError: the base is of another kind or incomplete, or the output cannot be written;
        nothing is left of it then.
    """
    module, path, output = run_import.source_named(source), Path(path), Path(output).absolute()
    leaves = checkpoint.open_leaves(path)
    made = conversion_record.read(path)
    if made and made.source != source:
        raise UserError(
            f"was converted from {made.source}, not {source}",
            field=str(path),
            hint=f"Say --source={made.source}",
        )
    with damage.reading(path):
        options = made.options if made else _measured(module, leaves, path, size)
        limits.check_network(options, str(path))
        plan = module.plan(options)
        tensors: Mapping[str, np.ndarray] = Exported(plan, leaves, path)
        check_adapters(plan, leaves, path)
        restore = getattr(module, "restore", None)
        tensors = restore(tensors, options) if restore else tensors
    run_import.check_new(output)
    run_import.check_room(output, sum(_bytes(header_of(tensors, name)) for name in tensors))
    with new_folder(output) as partial:
        partial.mkdir(parents=True)
        names = []
        for start, stem in plan.weight_files.items():
            names += write_shards(tensors, partial, start, stem)
        run_import.copy_extra_files(plan, path, partial)
        for name, text in plan.written_files.items():
            if not (partial / name).exists():
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_text(text(partial), "utf-8")
    return names


def _measured(
    module: ModuleType, leaves: Mapping[str, Any], base: Path, size: str
) -> Mapping[str, Any]:
    """Options of a source from a base's parameters.

    Args:
      module: of the source.
      leaves: {path: store} of the base.
      base: its folder, for errors.
      size: row of SIZES that the user named, or ''.

    Raises:
      UserError: the base is of another kind, or of another size than was named.
    """
    if not hasattr(module, "options_of"):
        return module.options(None, size)
    shapes = {path: tuple(store.shape) for path, store in leaves.items()}
    found = module.options_of(Base(shapes, base))
    if not size:
        return found
    named = rules.flatten(module.options(None, size))
    for path, value in rules.flatten(found).items():
        if path.rpartition("/")[2] in COMPARED and named.get(path, value) != value:
            what = f"{size} has {path} {named[path]}, and {base} has {value}"
            hint = "Leave --size out: the base tells its sizes"
            raise UserError(what, field="--size", hint=hint)
    return found


def header_of(tensors: Mapping[str, np.ndarray], name: str) -> Header:
    """Shape and dtype of a tensor; reads it only where nothing else tells them."""
    header = getattr(tensors, "header", None)
    if header:
        return header(name)
    return Header(tensors[name].shape, tensors[name].dtype)


def write_shards(
    tensors: Mapping[str, np.ndarray], folder: Path, start: str = "", stem: str = "model"
) -> list[str]:
    """Writes STEM.safetensors, or shards and their index.

    Args:
      tensors: {name: array}, read one at a time.
      folder: where to write.
      start: what the names of the chosen tensors begin with, and lack in the file.
      stem: path of the file below `folder`, without its ending.

    Returns:
      paths of the files below `folder`.
    """
    headers = {name: header_of(tensors, name) for name in tensors if name.startswith(start)}
    shards: list[list[str]] = [[]]
    size = 0
    for name, header in headers.items():
        if shards[-1] and size + _bytes(header) > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _bytes(header)
    count, files = len(shards), [f"{stem}.safetensors"]
    if count > 1:
        files = [f"{stem}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    (folder / stem).parent.mkdir(parents=True, exist_ok=True)
    for file, names in zip(files, shards, strict=True):
        write_file(tensors, {name: headers[name] for name in names}, folder / file, start)
    if count > 1:
        places = {
            name.removeprefix(start): Path(file).name
            for file, names in zip(files, shards, strict=True)
            for name in names
        }
        total = sum(_bytes(header) for header in headers.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        atomic.write_json(folder / f"{stem}.safetensors.index.json", index)
    return files


def write_file(
    tensors: Mapping[str, np.ndarray],
    headers: Mapping[str, Header],
    path: Path,
    start: str = "",
) -> None:
    """Writes one safetensors file, holding one tensor at a time.

    Args:
      tensors: {name: array}.
      headers: {name: header} of those that are written.
      path: of the file.
      start: what the names begin with, and lack in the file.

    Raises:
      CannotWrite: the disk is full; names file and tensor.
    """
    names = {np.dtype(dtype): name for name, dtype in SAFETENSORS.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, header in headers.items():
        first, end = end, end + _bytes(header)
        entries[name.removeprefix(start)] = {
            "dtype": names[header.dtype],
            "shape": list(header.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    name = "header"
    try:
        with atomic.opened(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in headers:
                tensor = np.ascontiguousarray(tensors[name])
                file.write(tensor.reshape(-1).view(np.uint8).data)
    except OSError as error:
        reason, safe = error.strerror or str(error), "Nothing was left behind"
        raise CannotWrite(f"{path.name}: {name}", reason, safe) from error


def _bytes(header: Header) -> int:
    return math.prod(header.shape) * header.dtype.itemsize
