"""Numbers in the heads of sounds and clips that say anything: read, or refused in one line."""

from __future__ import annotations

import io
import random
import resource
import struct

import hostile
import numpy as np
import pytest
import soundfile
from test_video_tables import clip

from xllm_jax.data.media import formats, matroska_elements, metadata_names, speech, video_tables

NUMBERS = (2**31 - 1, 2**32 - 1, 2**30, 10**8, 60_000, 24_000_000, 2**62, 2**63 - 1, 2**64 - 1, 0)
SOUNDS = (
    *(("WAV", "PCM_16"), ("WAV", "IMA_ADPCM"), ("WAV", "GSM610"), ("WAVEX", "PCM_16")),
    *(("AIFF", "PCM_16"), ("CAF", "PCM_16"), ("CAF", "ALAC_16"), ("NIST", "PCM_16")),
    *(("AU", "PCM_16"), ("W64", "PCM_16"), ("RF64", "PCM_16"), ("FLAC", "PCM_16")),
    *(("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
)
CLIPS = {"mp4": "mpeg4", "matroska": "mpeg4", "asf": "mpeg4", "avi": "mpeg4", "flv": "flv1"}
MEGABYTES = 64  # that a head may make a reader take for a second of sound


def changed(good: bytes, rng: random.Random, most: int, count: int):
    """Copies with another number somewhere in the first or the last bytes."""
    for _ in range(count):
        size, end = rng.choice((2, 4, 8)), rng.choice(("little", "big"))
        place = rng.randrange(min(most, len(good) - size))
        place = place if rng.random() < 0.7 else len(good) - size - place
        number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
        yield good[:place] + number.to_bytes(size, end) + good[place + size :]


@pytest.mark.parametrize("form, subtype", SOUNDS)
def test_any_head_of_a_sound(form, subtype, tmp_path):
    stream = io.BytesIO()
    samples = np.sin(np.arange(16_000) / 9).astype(np.float32) / 2
    soundfile.write(stream, samples, 16_000, format=form, subtype=subtype)
    path, rng = tmp_path / "sound", random.Random(f"{form} {subtype}")
    path.write_bytes(stream.getvalue())
    assert len(speech.read(path)) >= 16_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for content in changed(stream.getvalue(), rng, 220, 150):
        path.write_bytes(content)
        hostile.outcome(lambda: speech.read(path))
        hostile.outcome(lambda: speech.count_frames(path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10


def test_a_chunk_of_caf_that_ends_nowhere(tmp_path):
    """Before, OSError: there is no such place in a file."""
    head = b"caff\0\1\0\0" + struct.pack(">4sq", b"info", 2**63 - 1) + bytes(100)
    (tmp_path / "a.caf").write_bytes(head)
    assert hostile.outcome(lambda: speech.read(tmp_path / "a.caf")) == "refused"


@pytest.mark.parametrize("form", CLIPS)
def test_any_head_of_a_clip(form, tmp_path):
    """What is looked at before FFmpeg is."""
    good = clip(tmp_path / "whole", 10, form, codec=CLIPS[form])
    path, rng = tmp_path / "clip", random.Random(form)
    for content in changed(good, rng, 900, 500):
        path.write_bytes(content)
        for module in (video_tables, matroska_elements, metadata_names):
            hostile.outcome(lambda: module.check(path, content[: formats.HEAD]))  # noqa: B023
