"""Videos whose every frame is one gray, which tells its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from xllm_jax.data.media import image

STEP = 10  # gray levels between two frames


def write(
    path: Path,
    frames: int | Sequence[int] = 24,
    codec: str = "libx264",
    form: Mapping[str, str] | None = None,
    coding: Mapping[str, str] | None = None,
    rate: int = 8,
) -> Path:
    """Writes a video of 96 x 64 pixels and returns its path.

    Args:
      path: the file; its name says the container.
      frames: how many, or the millisecond at which each one appears.
      codec: the encoder.
      form: options of the container.
      coding: options of the encoder.
      rate: frames a second.
    """
    times = range(frames) if isinstance(frames, int) else frames
    tick = Fraction(1, rate if isinstance(frames, int) else 1000)
    with av.open(str(path), "w", options=dict(form or {})) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.options = 96, 64, dict(coding or {})
        if codec in ("mpeg4", "mjpeg", "wmv2"):
            stream.options |= {"qscale": "2"}
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = tick
        for number, time in enumerate(times):
            gray = np.full((64, 96, 3), STEP * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(gray, "rgb24").reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = time, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(values: np.ndarray) -> list[int]:
    """Which frame each frame of `video.load` is."""
    grays = (values * image.STD + image.MEAN).mean((1, 2, 3)) * 255
    return [round(gray / STEP) for gray in grays]
