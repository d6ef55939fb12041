"""How much one client may ask of the server."""

from __future__ import annotations

import dataclasses

from xllm_jax.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of one request, and of all that are under way.

    Attributes:
      body: bytes of one request.
      bodies: bytes of all requests under way; one that would exceed them is refused with 503.
      requests: requests under way, those that only read `/health` included.
      receive_seconds: that a client may take to send its request.
      media: files of a request, over all of its messages.
      medium: bytes of one file.
      pixels: of a picture, and of a frame.
      frames: of a clip.
      clip_seconds: of a clip.
      sound_seconds: of a sound.
      messages: of a conversation.
      text: characters of a conversation.
      choices: answers to one request (`n`).
      fetch_seconds: that fetching one file may take, redirects included.
      decode_seconds: that decoding one file may take; its decoder is killed then.
      decode_memory: gigabytes that decoding one file may take.
      decoders: files that are decoded at a time.

    Raises:
      UserError: a bound that is not positive; names it.
    """

    body: int = 64 << 20
    bodies: int = 512 << 20
    requests: int = 256
    receive_seconds: float = 60.0
    media: int = 16
    medium: int = 48 << 20
    pixels: int = 40_000_000
    frames: int = 36_000
    clip_seconds: float = 600.0
    sound_seconds: float = 60.0
    messages: int = 256
    text: int = 200_000
    choices: int = 8
    fetch_seconds: float = 20.0
    decode_seconds: float = 20.0
    decode_memory: float = 2.0
    decoders: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise UserError("is not positive", field=f"limits.{field.name}")
