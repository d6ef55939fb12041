"""Opens PyTorch and safetensors checkpoints as lazy {name: NumPy array} mappings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from xllm_jax.core.errors import UserError


class TorchFile(Mapping):
    """A `.bin`/`.pth` file, memory-mapped; tensors become NumPy arrays when they are read.

    Args:
      path: file written by `torch.save`.
      key: name under which the state dict lies ('model' in LAVIS files); found by itself when None.
    """

    def __init__(self, path: str | Path, key: str | None = None):
        import torch

        self.path = Path(path)
        if not self.path.exists():
            raise UserError("no such file", field=str(path), mend="Give the checkpoint's path")
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise UserError(
                f"not a PyTorch file of plain tensors ({type(error).__name__})",
                field=str(path),
                mend="Download it again; files that carry code are refused",
            ) from error
        if key is None:
            key = next((k for k in ("model", "state_dict", "module") if k in state), None)
        state = state[key] if key else state
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
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return Shards([_open_file(path / name) for name in names])
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


def _to_numpy(tensor) -> np.ndarray:
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
