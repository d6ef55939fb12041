"""Which formats a medium may have: the slot of an image takes pictures, that of a video clips.

Decoders know hundreds of formats. Some start programs (EPS), read other files (playlists) or draw
a text file as a clip, and a file's name says nothing about what it holds. So every medium is told
by its first bytes before a decoder sees it, and the decoders get these lists, too.
"""

from __future__ import annotations

import os
import re

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import paths

HEAD = 1024  # bytes that tell a format; MPEG transport streams need several packets
IMAGES = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # as Pillow calls them
SOUNDS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "MPEG", "AIFF", "AU", "NIST", "CAF")
VIDEOS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,flv,mpegts,mpeg,mpegvideo,asf,ogg"  # FFmpeg's

_BEGINNINGS = {
    "image": (
        rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP|GIF8[79]a|II[*+]\0|MM\0[*+]",
        rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}",
    ),
    "video": (
        rb".{4}(ftyp|styp|moov|moof|mdat|sidx|free|skip|wide|uuid|pnot)|\x1a\x45\xdf\xa3",
        rb"RIFF.{4}AVI |FLV\x01|OggS|\0\0\x01[\xb3\xba]|\x30\x26\xb2\x75\x8e\x66\xcf\x11",
        rb"\x47.{187}\x47.{187}\x47|.{4}\x47.{191}\x47.{191}\x47",
    ),
    "speech": (
        rb"(RIFF|RIFX|RF64).{4}WAVE|riff\x2e\x91\xcf\x11|fLaC|OggS|FORM.{4}AIF[FC]",
        rb"\.snd|NIST_1A|caff|ID3[\x02-\x04]|\xff[\xe2-\xe5\xf2-\xf5\xfa-\xfd]",
    ),
    "cif": (rb"\x93NUMPY",),
}
_KNOWN = {name: re.compile(b"|".join(some), re.DOTALL) for name, some in _BEGINNINGS.items()}
_WORDS = {"image": "cannot be read as an image", "video": "cannot be read as a video"}
_WORDS |= {"speech": "not a readable audio file", "cif": "cannot be read as features"}
# How Python writes an object that a decoder read from: with its address, another one each time.
_OBJECT = re.compile(r"<[^<>]* at 0x[0-9a-fA-F]+>")


def check(path: str | os.PathLike, slot: str, head: bytes | None = None) -> None:
    """Looks at the first bytes of a medium.

    Args:
      path: of the medium.
      slot: a modality; those beyond `image`, `video`, `speech` and `cif` take anything.
      head: its first HEAD bytes, or all if there are fewer; None reads them.

    Raises:
      UserError: it is of no format for the slot, or cannot be read.
    """
    known = _KNOWN.get(slot)
    if known is None:
        return
    head = paths.read(path, HEAD) if head is None else head
    if not known.match(head):
        what = f"{_WORDS[slot]} (of no known format)"
        if slot == "video" and _KNOWN["speech"].match(head):
            what = "has no video stream: it is a sound"
        raise UserError(what, field=str(path), hint="Download it again")


def reason(error: Exception) -> str:
    """What a decoder says, without addresses of this process's memory."""
    return _OBJECT.sub("the file", str(error))
