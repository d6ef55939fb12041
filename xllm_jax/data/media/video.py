"""Video files to a fixed number of normalized frames (X-LLM's `rawvideo_util.py`).

Frames are spread evenly over the time of the whole video; the repository's own rule, the first
frames at one a second, is the option 'reference'. They are turned as a player shows them, resized
by the short side and cropped to the center. A path that ends in '#t=12.5,30' is read as those
seconds of the video alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import image, paths, video_readings, video_times
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.media.video_readings import Pick
from xllm_jax.data.media.video_times import Timeline

REFERENCE_SECONDS = 60  # the repository reads at most this many seconds after the first frame
END_SECONDS = 2  # annotated clips may start so much behind the last frame


def load(
    path: str | Path, options: Mapping[str, Any], rng: np.random.Generator | None = None
) -> np.ndarray:
    """Reads the frames of one video.

    Args:
      path: the file.
      options: 'frames' wanted (5), 'size' in pixels (224), 'sampling': 'uniform' or 'reference'
        ('uniform'), 'normalization' and 'resample' as of images. Options of images that do not
        concern videos are ignored.
      rng: ignored; frames are the same in training and evaluation.

    Returns:
      `[frames, size, size, 3]` float32, normalized. A video with fewer frames than wanted repeats
      some of them in 'uniform' and ends with all-zero frames in 'reference'.

    Raises:
      UserError: the file is missing, not a video, damaged or without a frame; unknown sampling.
    """
    wanted, size = options.get("frames", 5), options.get("size", 224)
    chosen = pictures(path, wanted, options.get("sampling", "uniform"))
    kind, by = image.normalization(options), image.resampling(options)
    pixels = {id(one): image.normalize(center(one, size, by), kind) for one in chosen}
    empty = [np.zeros((size, size, 3), np.float32)] * (wanted - len(chosen))
    return np.stack([pixels[id(one)] for one in chosen] + empty)


def pictures(path: str | Path, wanted: int, sampling: str = "uniform") -> list[Image.Image]:
    """Upright RGB pictures of one video or of its span, in order, at most `wanted`.

    Args:
      path: the file.
      wanted: pictures asked for; frames repeat where there are fewer.
      sampling: 'uniform' or 'reference'.

    Raises:
      UserError: as in `load`.
    """
    span = paths.place(path).span
    if not span:
        return video_readings.pictures(path, _of_whole(wanted, sampling))
    times = span_times(*span, wanted, sampling)
    return video_readings.pictures(path, functools.partial(_of_span, times, path), times)


def seen(path: str | Path, data: Data) -> list[np.ndarray]:
    """The frames that a model sees of one video, `[size, size, 3]` uint8 each; errors of `load`.

    Args:
      path: the file.
      data: with the options of its modality.
    """
    options = data.image | data.video
    wanted, size = options.get("frames", 5), options.get("size", 224)
    chosen = pictures(path, wanted, options.get("sampling", "uniform"))
    return [center(one, size, image.resampling(options)) for one in chosen]


def _of_whole(wanted: int, sampling: str) -> Pick:
    """What chooses frames of a whole video.

    Raises:
      UserError: unknown sampling.
    """
    if sampling == "uniform":
        return functools.partial(_uniform, wanted)
    if sampling == "reference":
        return functools.partial(_reference, wanted)
    raise UserError(
        f"unknown sampling {sampling!r}", field="data.video.sampling", hint="uniform or reference"
    )


def _uniform(wanted: int, shown: Timeline) -> list[int]:
    return video_times.uniform_frames(shown, wanted)


def _reference(wanted: int, shown: Timeline) -> list[int]:
    count, rate = len(shown.stamps), shown.rate
    measured = float((count - 1) / shown.last) if shown.last else rate
    # Rounded stamps measure 29.998 where a header says 30, and other headers say anything.
    close = abs(rate - measured) <= measured / 100
    return reference_frames(count, rate if close else measured)[:wanted]


def reference_frames(count: int, rate: float) -> list[int]:
    """One frame a second from the first on, the rate cut to whole frames, for 60 seconds."""
    step = max(int(rate), 1)
    return list(range(0, min(count, REFERENCE_SECONDS * step + 1), step))


def span_times(start: float, end: float, wanted: int, sampling: str = "uniform") -> list[Fraction]:
    """Seconds behind the first frame at which a span of a video is looked at.

    Raises:
      UserError: unknown sampling, or an end that is not behind the start.
    """
    _of_whole(wanted, sampling)  # refuses an unknown sampling
    first, length = Fraction(start), Fraction(end) - Fraction(start)
    if length <= 0:
        raise UserError(f"a clip from {start} s to {end} s has no length")
    if sampling == "uniform":
        return video_times.uniform_times(first, length, wanted)
    return [first + second for second in range(min(wanted, REFERENCE_SECONDS + 1, ceil(length)))]


def _of_span(times: Sequence[Fraction], path: str | Path, shown: Timeline) -> list[int]:
    """Numbers of the frames shown at some times.

    Raises:
      UserError: all of them are behind the video's end.
    """
    if times[0] > shown.last + END_SECONDS:
        what = f"has no frame at {float(times[0]):.1f} s"
        raise UserError(what, field=str(path), hint="The clip lies beyond the video's end")
    return [shown.at(time) for time in times]


def center(
    picture: Image.Image, size: int, by: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """Short side to `size`, then the central square: `[size, size, 3]` uint8."""
    width, height = picture.size
    short = min(width, height)
    shape = (int(size * width / short), int(size * height / short))
    picture = picture.resize(shape, by)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"))


def _load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    return load(path, data.image | data.video, rng)


def _read(path: str) -> np.ndarray:
    return load(path, {"size": 32, "frames": 1})


def _shape(data: Data) -> tuple[int, ...]:
    size = (data.image | data.video).get("size", 224)
    return size, size, 3


def _items(data: Data) -> int:
    return (data.image | data.video).get("frames", 5)


MODALITY = Modality(
    load=_load,
    read=_read,
    shape=_shape,
    fields=("image.size", "image.normalization", "image.resample", "video"),
    libraries=("PyAV", "FFmpeg", "Pillow"),
    items=_items,
    tasks=("video_caption", "vqa"),
    view="frames",
)
