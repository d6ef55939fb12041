"""Files of a sample as data URIs: small pictures, frames of a video, sound with its spectrogram."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

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
    with Image.open(path) as opened:
        return picture(opened)


def frames(path: str | Path) -> list[str]:
    """Frames at the centers of FRAMES equal parts of a video."""
    import av

    with av.open(str(path)) as container:
        decoded = [frame.to_image() for frame in container.decode(video=0)]
    chosen = [int((i + 0.5) * len(decoded) / FRAMES) for i in range(FRAMES)]
    return [picture(decoded[i]) for i in chosen]


def spectrogram(path: str | Path) -> str:
    """Log-mel filterbanks of a speech file, time to the right, low frequencies below."""
    from xllm_jax.data.media import speech

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

    samples, rate = soundfile.read(path, dtype="float32")
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format="MP3")
    return uri(stream.getvalue(), "audio/mpeg")
