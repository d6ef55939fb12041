"""Tensors of a TorchScript archive, read without its code: OpenAI's ViT-B-16.pt is such a file.

The archive is a zip whose `data.pkl` is a pickle of modules and tensors and whose `data/` holds the
numbers. The pickle is read with a closed list of what it may name: modules become plain mappings of
their attributes, tensors become places in the archive, everything else is refused, and nothing of
the archive is ever run. PyTorch is not needed.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from xllm_jax.convert import bounds, dry_run
from xllm_jax.convert.header import Header
from xllm_jax.core.errors import UserError

DEPTH, NAMES = 64, 1 << 20  # of modules within each other, of tensors on all levels
LETTERS = 1 << 26  # of all names on all levels
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
            bounds.check_archive(self._archive, self.path)
            root = next(n for n in self._archive.namelist() if n.endswith("/data.pkl"))
            self._root = root.removesuffix("data.pkl")
            if self._archive.getinfo(root).file_size > bounds.MOST_PACKED:
                raise ValueError("too large")
            with self._archive.open(root) as file:
                self._places = _Walk().tensors(_load(file.read(), self.path.stat().st_size))
        except UserError as error:
            where = f"{path}: {error.field}" if error.field else str(path)
            raise UserError(error.what, field=where, hint=error.hint) from None
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
            storage = np.frombuffer(data, place.dtype)
            count = math.prod(place.shape)
            if not count:
                return np.empty(place.shape, place.dtype)
            # No step is negative, so the first element is the lowest and the last the highest.
            last = place.offset + sum((n - 1) * s for n, s in zip(place.shape, place.strides))
            if last >= len(storage) or count > len(storage):
                raise ValueError("outside of its storage")
            steps = tuple(stride * storage.itemsize for stride in place.strides)
            first = storage[place.offset :]
            return np.lib.stride_tricks.as_strided(first, place.shape, steps, writeable=False)
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
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception:  # of a damaged directory, which the reader of other files names
        return False


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
            return np.dtype(STORAGES[name])  # which, unlike the type, cannot be called
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _place,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): lambda *_: {},
        }
        lists = ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
        # What they would copy holds no tensors, and could be copied any number of times.
        known |= {("torch.jit._pickle", kind): lambda *_: [] for kind in lists}
        if (module, name) not in known:
            raise UserError(
                f"its data names {module}.{name}, which is neither module nor tensor",
                hint="Only archives of parameters are read; nothing of them is run",
            )
        return known[module, name]

    def persistent_load(self, pid: tuple) -> tuple[Any, str]:
        """('storage', dtype, entry, device, length) to what `_place` needs."""
        _, dtype, entry, *_ = pid
        if not isinstance(dtype, np.dtype) or type(entry) is not str:
            raise ValueError("a storage without a type or a name")
        return dtype, entry


def _place(
    storage: tuple[Any, str], offset: int, shape: tuple, strides: tuple, *_: object
) -> Place:
    dtype, entry = storage
    known = bounds.shape(shape, dtype, entry)
    steps = bounds.shape(strides, np.int8, entry)
    if type(offset) is not int or offset < 0 or len(known) != len(steps):
        raise ValueError("a tensor without a place")
    return Place(dtype, entry, offset, known, steps)


def _load(content: bytes, size: int) -> Any:
    """What `data.pkl` holds.

    Raises:
      ValueError: it asks for more memory than a description of modules needs.
    """
    dry_run.names(io.BytesIO(content), size)
    return _Reader(io.BytesIO(content)).load()


class _Walk:
    """Names of all tensors, as `state_dict` has them: a module that stands twice has two.

    Each module is looked at once, and what a file can make of names is bounded.
    """

    def __init__(self) -> None:
        self._known: dict[int, dict[str, Place]] = {}
        self._names = self._letters = 0

    def tensors(self, module: Any, depth: int = 0) -> dict[str, Place]:
        """{name: place} of every tensor below a module.

        Raises:
          ValueError: deeper than DEPTH, as a module that holds itself is, or more than NAMES.
        """
        if id(module) in self._known:
            return self._known[id(module)]
        if depth > DEPTH:
            raise ValueError("modules too deep within each other")
        found: dict[str, Place] = {}
        for name, value in getattr(module, "state", {}).items():
            if isinstance(value, Place):
                found[name] = value
            elif isinstance(value, _Module):
                below = self.tensors(value, depth + 1)
                self._names += len(below)
                self._letters += sum(map(len, below)) + len(below) * len(name)
                many = self._names > NAMES or self._letters > LETTERS
                if many or len(name) > bounds.LONGEST:
                    raise ValueError("too many tensors, or too long a name")
                found |= {f"{name}.{inner}": place for inner, place in below.items()}
        self._known[id(module)] = found
        return found
