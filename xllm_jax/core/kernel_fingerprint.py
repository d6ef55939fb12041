"""By which kernels adapters know their base: a short hash of each one's first layer."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import tensorstore

FIELD = "kernels"  # of about.json: {path: fingerprint}
KERNEL = "/kernel"


def of_leaves(
    leaves: Mapping[str, Any], about: Mapping[str, Any], places: Collection[str] | None = None
) -> dict[str, str]:
    """{kernel: hash} of a base; where kernels are packed, of the base that was packed.

    Args:
      leaves: {path: store} of `checkpoint.open_leaves`.
      about: what the base says of itself.
      places: paths of the layers that are asked for; None asks for all.
    """
    found = dict(about.get(FIELD, {}))
    for path, store in leaves.items():
        if path.endswith(KERNEL) and path not in found and _asked(path, places):
            found[path] = of_kernel(store)
    return {path: text for path, text in found.items() if _asked(path, places)}


def of_kernel(store: tensorstore.TensorStore) -> str:
    """Hash of a kernel's shape, dtype and first layer (hex, 16 digits)."""
    first = store[0] if len(store.shape) > 2 else store
    values = np.ascontiguousarray(np.asarray(first.read().result()))
    told = f"{tuple(store.shape)} {values.dtype} ".encode()
    return hashlib.sha256(told + values.reshape(-1).view(np.uint8).tobytes()).hexdigest()[:16]


def _asked(path: str, places: Collection[str] | None) -> bool:
    return places is None or path.removesuffix(KERNEL) in places
