"""Recorded photographs as the image and video processors resize, crop and normalize them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.vision_model import Reference
from xllm_jax.data.media import image, video


def processors(replay: Replay, reference: Reference) -> None:
    """Every photograph, squashed for evaluation, augmented by recorded boxes, and as a frame."""
    for name in replay.names("photo_*"):
        photo = Image.fromarray(replay.input(name))
        replay.attempt(_photo, photo, name.removeprefix("photo_"))


def _photo(replay: Replay, photo: Image.Image, number: str) -> None:
    for name in replay.names(f"eval_{number}_*"):
        size = int(name.split("_")[-1])
        pixels = image.resize(photo, size)
        replay.compare(name, _channels_first(pixels))
        replay.compare(f"eval_resized_uint8_{number}_{size}", pixels)
    for name in replay.names(f"train_{number}_*"):
        case = name.removeprefix("train_")
        box, flip = (replay.input(f"train_{part}_{case}") for part in ("box_ijhw", "flip"))
        pixels = image.augment(photo, int(case.split("_")[1]), tuple(box), bool(flip))
        replay.compare(name, _channels_first(pixels))
    for name in replay.names(f"videoframe_{number}"):
        pixels = video.center(photo, replay.recorded(name).shape[-1])
        replay.compare(name, _channels_first(pixels))


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    return np.moveaxis(image.normalize(pixels), -1, 0)
