"""Opens PyTorch and safetensors checkpoints as lazy {name: NumPy array} mappings."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError


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
        import torch

        self.path = Path(path)
        if not self.path.exists():
            raise UserError("no such file", field=str(path), mend="Give the checkpoint's path")
        try:
            mapped = zipfile.is_zipfile(self.path)
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            raise UserError(
                f"not a PyTorch file of plain tensors ({type(error).__name__})",
                field=str(path),
                mend="Download it again; files that carry code are refused",
            ) from error
        state = _state_dict(state, key, self.path)
        self._state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}

    def __getitem__(self, name: str) -> np.ndarray:
        return _to_numpy(self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


class SafetensorsFile(Mapping):
    """A `.safetensors` file; each tensor is read when it is asked for (bfloat16 included)."""

    def __init__(self, path: str | Path):
        from safetensors import safe_open

        if not Path(path).exists():
            raise UserError("no such file", field=str(path), mend="Give the checkpoint's path")
        try:
            self._file = safe_open(str(path), framework="flax")
        except Exception as error:
            raise UserError(
                f"not a safetensors file ({type(error).__name__})",
                field=str(path),
                mend="Download it again",
            ) from error
        self._names = list(self._file.keys())

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Shards(Mapping):
    """Several files read as one mapping; a name that two files hold is an error."""

    def __init__(self, files: list[Mapping]):
        self._home: dict[str, Mapping] = {}
        for file in files:
            for name in file:
                if name in self._home:
                    raise UserError("tensor stands in two shards", field=name)
                self._home[name] = file

    def __getitem__(self, name: str) -> np.ndarray:
        return self._home[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def open_checkpoint(path: str | Path) -> Mapping[str, np.ndarray]:
    """Opens a file, or a folder with shards (an index file is followed when there is one).

    Raises:
      UserError: nothing there that is a checkpoint, or a shard of the index is missing.
    """
    path = Path(path)
    if path.is_file():
        return _open_file(path)
    for index in sorted(path.glob("*.index.json")):
        return Shards([_open_file(path / name) for name in _shard_names(index)])
    found = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    found = found or sorted(path.glob("*.pth"))
    if not found:
        raise UserError(
            "no checkpoint here (.safetensors, .bin or .pth)",
            field=str(path),
            mend="Give the folder or file of the published checkpoint",
        )
    return Shards([_open_file(file) for file in found])


def _open_file(path: Path) -> Mapping[str, np.ndarray]:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _shard_names(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"not an index of shards ({type(error).__name__})",
            field=str(index),
            mend="Download it again",
        ) from error


def _state_dict(content: Any, key: str | None, path: Path) -> Mapping[str, Any]:
    """The mapping of tensors within a file: under `key`, under a usual name, or the file itself."""
    usual = ("model", "state_dict", "module") if key is None else (key,)
    if isinstance(content, Mapping):
        inner = next((content[k] for k in usual if isinstance(content.get(k), Mapping)), None)
        if inner is not None:
            return inner
        if key is None:
            return content
    raise UserError(
        "holds no state dict" + (f" under {key!r}" if key else ""),
        field=str(path),
        mend="Give the file of the model's weights",
    )


def _to_numpy(tensor) -> np.ndarray:
    import ml_dtypes
    import torch

    tensor = tensor.detach()  # parameters ask for gradients, which NumPy cannot give
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
