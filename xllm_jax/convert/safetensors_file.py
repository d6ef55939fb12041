"""A safetensors file as {name: NumPy array}, bfloat16 included, mapped tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from xllm_jax.convert import bounds
from xllm_jax.convert.header import Header, known
from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError

SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
"""Names of dtypes in a safetensors header."""


class SafetensorsFile(Mapping):
    """A `.safetensors` file; each tensor is mapped when it is asked for (bfloat16 included).

    Raises:
      UserError: not there, not such a file, or shorter than its header says.
    """

    def __init__(self, path: str | Path):
        from safetensors import safe_open

        self.path = Path(path)
        if not self.path.exists():
            raise UserError("no such file", field=str(path), hint="Give the checkpoint's path")
        try:
            with self.path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                self._check_length(length)
                self._start = 8 + length
                header = bounded.parsed(file.read(length))
            entries = {k: v for k, v in header.items() if k != "__metadata__"}
            for name in entries:
                bounds.check_name(name, self.path)
            self._check_end(entries)
            self._headers = {name: self._header(name, entry) for name, entry in entries.items()}
            with safe_open(str(path), framework="numpy"):  # checks every offset against the file
                pass
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"not a safetensors file ({type(error).__name__})",
                field=str(path),
                hint="Download it again",
            ) from error
        self._entries = entries

    def header(self, name: str) -> Header:
        """Shape and dtype; reads nothing."""
        return known(self._headers[name], self.path, name)

    def __getitem__(self, name: str) -> np.ndarray:
        header, start = self.header(name), self._start + self._entries[name]["data_offsets"][0]
        size = math.prod(header.shape) * header.dtype.itemsize
        if not size:
            return np.empty(header.shape, header.dtype)
        mapped = np.asarray(np.memmap(self.path, np.uint8, "r", start, size))
        return mapped.view(header.dtype).reshape(header.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _header(self, name: str, entry: Mapping[str, Any]) -> Header | None:
        """Shape and dtype, None for what NumPy cannot hold."""
        dtype = SAFETENSORS.get(entry["dtype"])
        shape = bounds.shape(entry["shape"], dtype or np.uint8, f"{self.path}: {name}")
        return None if dtype is None else Header(shape, np.dtype(dtype))

    def _check_length(self, length: int) -> None:
        """Raises UserError for a header that is longer than its file, or than any can be."""
        if length > min(bounded.MOST, self.path.stat().st_size):
            what = f"says that its header has {length:,} bytes"
            raise UserError(what, field=str(self.path), hint="Download it again")

    def _check_end(self, entries: Mapping[str, Any]) -> None:
        end = self.path.stat().st_size - self._start
        for name, entry in entries.items():
            if entry["data_offsets"][1] > end:
                raise UserError(
                    f"the file ends {entry['data_offsets'][1] - end} bytes before this tensor does",
                    field=f"{self.path}: {name}",
                    hint="Download it again",
                )
