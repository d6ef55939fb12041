"""Files of a sample as data URIs: small pictures, frames of a video, sound with its spectrogram."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from xllm_jax.data.media import image as data_image
from xllm_jax.data.media import speech, video

SIDE = 168  # longest side of a picture in pixels
FRAMES = 4


def uri(data: bytes, kind: str) -> str:
    """Bytes as a data URI of a MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(image: Image.Image) -> str:
    """An image, not larger than SIDE, as a JPEG data URI."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return uri(stream.getvalue(), "image/jpeg")


def image(path: str | Path) -> str:
    """An image file."""
    return picture(data_image.read(path))


def frames(path: str | Path) -> list[str]:
    """Frames at the centers of FRAMES equal parts of a video."""
    return [picture(frame) for frame in video.pictures(path, FRAMES)]


def spectrogram(path: str | Path) -> str:
    """Log-mel filterbanks of a speech file, time to the right, low frequencies below."""
    return shade(speech.filterbank(speech.read(path), 80))


def shade(features: np.ndarray) -> str:
    """Filterbanks `[frames, bins]` as a picture, loud is dark."""
    features = features.T[::-1]
    low, high = np.quantile(features, [0.05, 0.995])
    shade = np.clip((features - low) / max(high - low, 1e-6), 0, 1)
    stream = io.BytesIO()
    Image.fromarray((255 * (1 - shade)).astype(np.uint8)).save(stream, "PNG", optimize=True)
    return uri(stream.getvalue(), "image/png")


def sound(path: str | Path) -> str:
    """A speech file that any browser plays."""
    import soundfile

    stream = io.BytesIO()
    soundfile.write(stream, speech.read(path) / 32768, speech.RATE, format="MP3")
    return uri(stream.getvalue(), "audio/mpeg")
