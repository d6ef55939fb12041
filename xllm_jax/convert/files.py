"""Opens PyTorch and safetensors checkpoints as lazy {name: NumPy array} mappings.

Names, shapes and dtypes are known from headers; a tensor's bytes are mapped into memory when it is
asked for and leave it with the array, so that no more of a large file is ever resident than what is
in use.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xllm_jax.convert import bounds, inert, weight_files
from xllm_jax.convert.header import Header, known
from xllm_jax.convert.safetensors_file import SafetensorsFile
from xllm_jax.core.errors import UserError

MOST_MAPPINGS = 100  # within each other that are looked into
KEPT = 1 << 26
"""Bytes that a mapped file may hand out before its pages are let go of."""

USUAL = (
    "model",
    "state_dict",
    "checkpoint",
    "module",
    "model_state_dict",
    "state",
    "net",
    "network",
    "weights",
    "params",
    "model_ema",
    "state_dict_ema",
    "ema",
)
"""Where trainers keep the state dict within a file; moving averages where there is nothing else."""


class TorchFile(Mapping):
    """A `.bin`/`.pth` file, memory-mapped; tensors become NumPy arrays when they are read.

    Files from before PyTorch 1.6, such as the published bert-base ones, cannot be mapped and are
    read whole.

    Args:
      path: file written by `torch.save`.
      key: name under which the state dict lies ('model' in LAVIS files); found by itself when None.

    Raises:
      UserError: not there, not such a file, or one that holds no state dict.
    """

    def __init__(self, path: str | Path, key: str | None = None):
        self.path, self._key = Path(path), key
        if not self.path.exists():
            raise UserError("no such file", field=str(path), hint="Give the checkpoint's path")
        self._mapped = zipfile.is_zipfile(self.path)
        if self._mapped:
            self._check_archive()
        self._stand_ins: list[tuple[Any, str]] | None = None
        self._state, self._handed_out = self._load(), 0
        self._headers = {name: _torch_header(tensor) for name, tensor in self._state.items()}

    def header(self, name: str) -> Header:
        """Shape and dtype; reads nothing."""
        return known(self._headers[name], self.path, name)

    def __getitem__(self, name: str) -> np.ndarray:
        header = self.header(name)
        size = math.prod(header.shape) * header.dtype.itemsize
        # A mapped state keeps every page that was read through it, and takes long to load: it
        # serves many small tensors or one large one, and is mapped anew then.
        if self._mapped and self._handed_out and self._handed_out + size > KEPT:
            self._state, self._handed_out = self._load(), 0
        self._handed_out += size
        return _to_numpy(self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)

    def _check_archive(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as archive:
                bounds.check_archive(archive, self.path)
        except UserError:
            raise
        except Exception as error:  # what a damaged directory can raise has no bounds
            what = f"not a PyTorch file of plain tensors ({type(error).__name__})"
            raise UserError(what, field=str(self.path), hint="Download it again") from error

    def _load(self) -> dict[str, Any]:
        try:
            import torch
        except ImportError as error:
            hint = "pip install -e '.[convert]' brings it; safetensors need nothing"
            raise UserError("needs PyTorch to be read", field=str(self.path), hint=hint) from error
        try:
            if self._stand_ins is None:
                self._stand_ins = inert.stand_ins(inert.named(self.path))
            with torch.serialization.safe_globals(self._stand_ins):
                content = torch.load(
                    self.path, map_location="cpu", weights_only=True, mmap=self._mapped
                )
        except Exception as error:
            raise UserError(
                f"not a PyTorch file of plain tensors ({type(error).__name__})",
                field=str(self.path),
                hint="Download it again; files that carry code are refused",
            ) from error
        self.settings = inert.settings(content)
        state = _state_dict(content, self._key, self.path)
        return {str(k): v for k, v in state.items() if isinstance(v, torch.Tensor)}


class Checkpoint(Mapping):
    """A published checkpoint of one or several files, read as one mapping.

    Attributes:
      path: file or folder that the user named.
      files: the files with tensors.
      renamed: {wrapper that was left out of names: of how many}.
    """

    def __init__(self, path: Path, files: Mapping[Path, Mapping[str, np.ndarray]]):
        self.path, self.files = Path(path), list(files)
        self._home: dict[str, tuple[Path, Any, str]] = {}
        self.renamed: dict[str, int] = {}
        for where, file in files.items():
            for name in file:
                bounds.check_name(name, where)
                if name in self._home:
                    raise UserError(
                        f"the tensor stands in {self._home[name][0].name} too",
                        field=f"{where}: {name}",
                        hint="Keep one set of shards in the folder",
                    )
                self._home[name] = where, file, name

    @classmethod
    def joined(cls, path: Path, parts: Mapping[str, Checkpoint]) -> Checkpoint:
        """Several checkpoints as one.

        Args:
          path: of the folder that holds them.
          parts: {what the names of its tensors begin with: checkpoint}.
        """
        whole = cls(path, {})
        for start, part in parts.items():
            whole.files += part.files
            whole._home |= {f"{start}{name}": home for name, home in part._home.items()}
        return whole

    def below(self, start: str, path: Path) -> Checkpoint:
        """The part whose tensors' names begin with `start`, without it, in the folder `path`."""
        part = copy.copy(self)
        names = (name for name in self._home if name.startswith(start))
        part.path, part._home = path, {n.removeprefix(start): self._home[n] for n in names}
        return part

    def header(self, name: str) -> Header:
        """Shape and dtype; reads nothing."""
        _, file, stored = self._home[name]
        return file.header(stored)

    def where(self, name: str) -> str:
        """'FILE: NAME' for errors; the whole checkpoint's path for a tensor it lacks."""
        if name not in self._home:
            return f"{self.path}: {name}"
        where, _, stored = self._home[name]
        return f"{where}: {stored}"

    def under(self, names: Mapping[str, str], renamed: Mapping[str, int]) -> Checkpoint:
        """The same checkpoint under other names.

        Args:
          names: {name: new name} of every tensor.
          renamed: what was left out of them, and of how many, for the report.

        Raises:
          UserError: two tensors get one name.
        """
        other = copy.copy(self)
        other._home, other.renamed = {}, dict(renamed)
        for name, new in names.items():
            if new in other._home:
                what = f"is the same tensor as {other._home[new][2]} without their wrappers"
                raise UserError(what, field=self.where(name), hint="Keep one of the two")
            other._home[new] = self._home[name]
        return other

    def settings(self) -> dict[str, Any]:
        """What fairseq's trainer wrote of the model into the file; empty elsewhere."""
        files = {id(file): file for _, file, _ in self._home.values()}
        return next((s for file in files.values() if (s := getattr(file, "settings", None))), {})

    def config_file(self) -> Path:
        """Where its config.json is, or would be."""
        return (self.path if self.path.is_dir() else self.path.parent) / "config.json"

    def config(self) -> dict[str, Any]:
        """The config.json beside the tensors; empty when there is none.

        Raises:
          UserError: it is not JSON.
        """
        file = self.config_file()
        if not file.is_file():
            return {}
        config = bounds.read_json(file)
        return config if isinstance(config, dict) else {}

    def __getitem__(self, name: str) -> np.ndarray:
        _, file, stored = self._home[name]
        return file[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


@dataclasses.dataclass(frozen=True)
class Derived:
    """A tensor that is computed from others of the file, such as a dequantized weight.

    Attributes:
      inputs: names of the tensors it is made of.
      shape, dtype: of the result.
      make: arrays of `inputs`, in order, to the result.
    """

    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[..., np.ndarray]


class View(Mapping):
    """A checkpoint in which derived tensors stand instead of those they are made of."""

    def __init__(self, checkpoint: Checkpoint, derived: Mapping[str, Derived]):
        self.checkpoint, self.derived = checkpoint, dict(derived)
        inputs = {name for row in self.derived.values() for name in row.inputs}
        missing = sorted(inputs - checkpoint.keys())
        if missing:
            raise UserError(
                "the checkpoint has no such tensor",
                field=checkpoint.where(missing[0]),
                hint="Check the file, and that its kind and size are the ones you named",
            )
        self._names = [n for n in checkpoint if n not in inputs and n not in self.derived]

    def header(self, name: str) -> Header:
        """Shape and dtype; reads nothing."""
        if name not in self.derived:
            return self.checkpoint.header(name)
        return Header(tuple(self.derived[name].shape), np.dtype(self.derived[name].dtype))

    def where(self, name: str) -> str:
        """'FILE: NAME' of the tensor, or of the first one that it is made of."""
        derived = self.derived.get(name)
        return self.checkpoint.where(derived.inputs[0] if derived else name)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.derived:
            return self.checkpoint[name]
        row = self.derived[name]
        return row.make(*(self.checkpoint[source] for source in row.inputs))

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self.derived

    def __len__(self) -> int:
        return len(self._names) + len(self.derived)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a file, a folder with shards (an index file is followed), or a pipeline's folder.

    Raises:
      UserError: nothing there that is a checkpoint, a shard of the index is missing, or a shard
        lacks a tensor that the index promises.
    """
    path = Path(path)
    if path.is_file():
        return Checkpoint(path, {path: _open_file(path)})
    if (path / "model_index.json").exists():
        from xllm_jax.convert import pipeline_folder

        return pipeline_folder.open_pipeline(path)
    index = weight_files.index_of(path)
    if index:
        return _open_shards(path, index)
    return Checkpoint(path, {file: _open_file(file) for file in weight_files.without_index(path)})


def _open_shards(path: Path, index: Path) -> Checkpoint:
    names = weight_files.shards_of(index)
    shards = {path / name: None for name in sorted(set(names.values()))}
    for shard in shards:
        if not os.path.isfile(shard):
            tensor = min(name for name, file in names.items() if path / file == shard)
            raise UserError(
                "this shard of the index is missing",
                field=f"{str(shard)[:400]}: {tensor[: bounds.SHOWN]}",
                hint="Download it again",
            )
        shards[shard] = _open_file(shard)
    for name, file in names.items():
        if name not in shards[path / file]:
            raise UserError(
                f"{index.name} promises this tensor, the shard lacks it",
                field=f"{path / file}: {name}",
                hint="Download the shard again",
            )
    return Checkpoint(path, shards)


def _open_file(path: Path) -> Mapping[str, np.ndarray]:
    from xllm_jax.convert import torchscript

    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if torchscript.is_torchscript(path):
        return torchscript.TorchScriptFile(path)
    return TorchFile(path)


def _state_dict(content: object, key: str | None, path: Path) -> Mapping[str, Any]:
    """The mapping of tensors within a file: under `key`, under a usual name, or the file itself."""
    place = content.get(key) if key and isinstance(content, Mapping) else content
    if isinstance(place, Mapping):
        return _of_tensors(place, set()) or place
    raise UserError(
        "holds no state dict" + (f" under {key!r}" if key else ""),
        field=str(path),
        hint="Give the file of the model's weights",
    )


def _of_tensors(content: Mapping[str, Any], seen: set[int]) -> Mapping[str, Any] | None:
    """What lies under the first of the usual names and holds tensors, or the mapping itself."""
    import torch

    seen.add(id(content))  # a file may hold one mapping in many places, or within itself
    for name in USUAL if len(seen) < MOST_MAPPINGS else ():
        inner = content.get(name)
        new = isinstance(inner, Mapping) and id(inner) not in seen
        found = _of_tensors(inner, seen) if new else None
        if found is not None:
            return found
    return content if any(isinstance(x, torch.Tensor) for x in content.values()) else None


def _torch_header(tensor) -> Header | None:
    """Shape and dtype, None for what is not read: sparse, quantized, eight-bit, repeated."""
    try:
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return None  # one number that stands for any number of them
        return Header(tuple(tensor.shape), _to_numpy(tensor[:0] if tensor.dim() else tensor).dtype)
    except (TypeError, RuntimeError, NotImplementedError):
        return None


def _to_numpy(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach()  # parameters ask for gradients, which NumPy cannot give
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
