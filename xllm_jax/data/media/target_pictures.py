"""Pictures that answers stand for, as an autoencoder of latent diffusion reads them.

The central square of a file at the side that `data.signals` names; 8-bit numbers, which are a
quarter of the bytes, become -1 to 1 on the device.
"""

from __future__ import annotations

import functools

import numpy as np

from xllm_jax.core.stage import Data
from xllm_jax.data.media import image
from xllm_jax.data.media.modality import Modality

KINDS = ("image",)  # modalities of answers that a file can show


def name_of(modality: str) -> str:
    """How the pictures of a modality's answers are called among the modalities of files."""
    return f"{modality} of an answer"


def _load(modality: str, path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    """`[1, side, side, 3]` uint8; never augmented, for the caption says left and right."""
    picture = image.read(path, orientation=image.orientation(data.image))
    return image.center(picture, data.signals[modality].pixels)[None]


def _shape(modality: str, data: Data) -> tuple[int, ...]:
    side = data.signals[modality].pixels
    return side, side, 3


def _record(modality: str) -> Modality:
    return Modality(
        load=functools.partial(_load, modality),
        read=image.read,
        shape=functools.partial(_shape, modality),
        fields=("signals",),
        libraries=("Pillow",),
        view="picture",
    )


MODALITIES = {name_of(kind): _record(kind) for kind in KINDS}
