"""WAV files of 16-bit samples, the form that speech corpora come in, without a decoder."""

from __future__ import annotations

import io
import struct

import numpy as np

from xllm_jax.data.media.unsized import chunks

STREAMED = 0x7FFFF000  # from here on, and 0, sizes that writers to a pipe leave in a header
PCM = 1


def samples(content: bytes) -> tuple[np.ndarray, int] | None:
    """The samples of a whole file of plain 16-bit PCM.

    Args:
      content: of the file.

    Returns:
      (`[samples, channels]` float32 on [-1, 1), samples a second); None for any other file, be it
      of another form, cut off, or wrong.
    """
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return None
    form = None
    for name, start, size in chunks(io.BytesIO(content)):
        if name == b"fmt " and size >= 16 and start + 16 <= len(content):
            form = struct.unpack_from("<HHIIHH", content, start)
        if name == b"data":
            break
    else:
        return None
    if form is None or not 0 < size < STREAMED or start + size > len(content):
        return None
    kind, channels, rate, _, align, bits = form
    if kind != PCM or bits != 16 or not channels or align != 2 * channels:
        return None
    whole = size // align * channels
    found = np.frombuffer(content, "<i2", whole, start).astype(np.float32)
    found /= np.float32(32768)
    return found.reshape(-1, channels), rate
