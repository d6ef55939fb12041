"""Names for the types that the whole package shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax

Array = jax.Array


class Device(Protocol):
    """What is read of a `jax.Device`, which has no type of its own."""

    platform: str
    device_kind: str
    process_index: int

    def memory_stats(self) -> dict[str, int] | None:
        """Bytes in use and the like; None where the platform does not count."""
        ...


Params = dict[str, Any]
"""A tree of parameters, or of their shapes: nested dicts with one entry a part at the top."""

Flat = dict[str, Any]
"""The same as {path: leaf}; see `rules.flatten`."""

Metrics = dict[str, Any]
"""{name: scalar array or WeightedMean}, of a step or a loss."""

Shapes = dict[str, jax.ShapeDtypeStruct]
"""{path: shape and dtype of a parameter, and its sharding where it is known}."""

Record = Mapping[str, Any]
"""Plain data as it is read from JSON."""
