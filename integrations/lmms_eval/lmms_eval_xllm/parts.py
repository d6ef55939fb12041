"""lmms-eval's messages as OpenAI's; media are `data:` URLs, so that no path reaches the server."""

from __future__ import annotations

import base64
import io
import mimetypes
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import soundfile
from PIL import Image

KINDS = ("image", "video", "audio")
NAMES = {"mpeg": "mp3", "vnd.wave": "wav"}  # OpenAI's names of sound formats
SAID = {"image": "image_url", "video": "video_url"}


def messages(given: Sequence[Any]) -> list[dict[str, Any]]:
    """OpenAI's messages.

    Args:
      given: of lmms-eval, {'role', 'content': [{'type': 'text', 'text'} or {'type', 'url'}, …]};
        'url' is a path, a PIL image, or of sound {'array', 'sampling_rate'}.
    """
    return [{"role": one["role"], "content": [part(p) for p in one["content"]]} for one in given]


def part(given: Mapping[str, Any]) -> dict[str, Any]:
    """One part of a message.

    Raises:
      ValueError: it is of a kind that the server does not take.
    """
    kind = given["type"]
    if kind == "text":
        return {"type": "text", "text": given["text"]}
    if kind not in KINDS:
        raise ValueError(f"a part of the kind {kind!r}")
    content, mime = encoded(kind, given["url"])
    text = base64.b64encode(content).decode()
    if kind == "audio":
        name = mime.split("/")[1].removeprefix("x-")
        return {
            "type": "input_audio",
            "input_audio": {"data": text, "format": NAMES.get(name, name)},
        }
    return {"type": SAID[kind], SAID[kind]: {"url": f"data:{mime};base64,{text}"}}


def encoded(kind: str, medium: Any) -> tuple[bytes, str]:
    """(bytes of a file, its MIME type) of a path, a picture or a sound.

    Raises:
      ValueError: it is something else.
    """
    if isinstance(medium, str | os.PathLike):
        with open(medium, "rb") as opened:
            known = mimetypes.guess_type(str(medium))[0]
            return opened.read(), known or {"image": "image/png", "video": "video/mp4"}.get(
                kind, "audio/wav"
            )
    written = io.BytesIO()
    if isinstance(medium, Image.Image):
        medium.convert("RGB").save(written, "PNG")
        return written.getvalue(), "image/png"
    if isinstance(medium, Mapping) and "array" in medium:
        values = np.asarray(medium["array"], np.float32)
        soundfile.write(written, values, int(medium["sampling_rate"]), format="WAV")
        return written.getvalue(), "audio/wav"
    raise ValueError(f"{kind} as {type(medium).__name__}")
