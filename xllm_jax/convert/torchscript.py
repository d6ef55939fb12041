"""Tensors of a TorchScript archive, read without its code: OpenAI's ViT-B-16.pt is such a file.

The archive is a zip whose `data.pkl` is a pickle of modules and tensors and whose `data/` holds the
numbers. The pickle is read with a closed list of what it may name: modules become plain mappings of
their attributes, tensors become places in the archive, everything else is refused, and nothing of
the archive is ever run. PyTorch is not needed.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from xllm_jax.convert.header import Header
from xllm_jax.core.errors import UserError

STORAGES = {
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "ShortStorage": np.int16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "BoolStorage": np.bool_,
}


class Place(NamedTuple):
    """Where a tensor lies: its storage's dtype and entry, and how it is laid out in it."""

    dtype: Any
    entry: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchScriptFile(Mapping):
    """A file of `torch.jit.save` as {parameter or buffer name: NumPy array}, read one at a time.

    Raises:
      UserError: not such an archive, truncated, or one that holds more than modules and tensors.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._archive = zipfile.ZipFile(self.path)
            root = next(n for n in self._archive.namelist() if n.endswith("/data.pkl"))
            self._root = root.removesuffix("data.pkl")
            with self._archive.open(root) as file:
                self._places = dict(_tensors(_Reader(file).load()))
        except UserError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise UserError(
                f"not a TorchScript archive ({type(error).__name__})",
                field=str(path),
                hint="Download it again",
            ) from error

    def __getitem__(self, name: str) -> np.ndarray:
        place = self._places[name]
        try:
            data = self._archive.read(f"{self._root}data/{place.entry}")
            storage = np.frombuffer(data, place.dtype)[place.offset :]
            strides = tuple(stride * storage.itemsize for stride in place.strides)
            reach = 1 + sum((n - 1) * s for n, s in zip(place.shape, place.strides))
            if min(place.shape, default=1) and not 0 < reach <= len(storage):
                raise ValueError("outside of its storage")
            return np.lib.stride_tricks.as_strided(storage, place.shape, strides, writeable=False)
        except Exception as error:
            raise UserError(
                f"cannot be read ({type(error).__name__})",
                field=f"{self.path}: {name}",
                hint="Download it again",
            ) from error

    def header(self, name: str) -> Header:
        """Shape and dtype; reads nothing."""
        return Header(self._places[name].shape, np.dtype(self._places[name].dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive: a zip with code beside its data."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


class _Module:
    """Any module of the archive: its attributes alone."""

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = state


class _Reader(pickle.Unpickler):
    """Reads `data.pkl`; whatever is not named here cannot be made or called."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _place,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        lists = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
        known |= {("torch.jit._pickle", kind): list for kind in lists}
        if (module, name) not in known:
            raise UserError(
                f"its data names {module}.{name}, which is neither module nor tensor",
                hint="Only archives of parameters are read; nothing of them is run",
            )
        return known[module, name]

    def persistent_load(self, pid: tuple) -> tuple[Any, str]:
        """('storage', dtype, entry, device, length) to what `_place` needs."""
        return pid[1], str(pid[2])


def _place(storage: tuple[Any, str], offset: int, shape: tuple, strides: tuple, *_: Any) -> Place:
    return Place(*storage, int(offset), tuple(shape), tuple(strides))


def _tensors(module: Any, prefix: str = "") -> Iterator[tuple[str, Place]]:
    """(name as in `state_dict`, place) of every tensor below a module."""
    for name, value in getattr(module, "state", {}).items():
        if isinstance(value, Place):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
