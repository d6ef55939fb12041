"""The files of a request, from `data:` URLs, base64 or allowed hosts, looked at before they count.

Files are kept in memory under a name that begins with the request's own key and says which part of
the request they are; what a client calls them is not looked at.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import re
import urllib.parse
from collections.abc import Callable, Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.media.facts import Facts
from xllm_jax.data.media.paths import Carried
from xllm_jax.serve.errors import ApiError, wrong
from xllm_jax.serve.limits import Limits

DATA = re.compile(r"data:([^,]{0,200}),", re.IGNORECASE)
SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
SPACE = str.maketrans("", "", " \t\r\n")

Medium = tuple[str, Carried]  # modality and file


@dataclasses.dataclass(frozen=True)
class Part:
    """A file as a request holds it.

    Attributes:
      modality: 'image', 'video' or 'speech'.
      param: its place in the request, such as 'messages[0].content[1]'.
      text: a URL, a `data:` URL or base64; '' where `content` holds the bytes.
      content: the bytes themselves.
    """

    modality: str
    param: str
    text: str = ""
    content: bytes = b""


@dataclasses.dataclass(frozen=True)
class MediaReader:
    """Takes the files of requests.

    Attributes:
      limits: of them.
      fetch: (URL, param) -> bytes.
      facts: (modality, file) -> its size, by a worker that can be killed.
    """

    limits: Limits
    fetch: Callable[[str, str], bytes]
    facts: Callable[[str, str], Facts]

    def __call__(self, parts: Sequence[Part], key: str) -> list[Medium]:
        """All files of one request, in order. Blocks, so call it from a thread.

        Args:
          parts: as the request holds them.
          key: of the request, 32 hexadecimal digits.

        Raises:
          ApiError: too many, too large, of no known format, or a URL that is not fetched.
        """
        if len(parts) > self.limits.media:
            what = f"The request holds {len(parts)} files, more than {self.limits.media}"
            raise wrong(what, "messages", "too_many_files")
        return [(part.modality, self._file(part, key)) for part in parts]

    def warm_up(self) -> None:
        """Starts what looks at files, which takes seconds."""
        with contextlib.suppress(UserError):  # it is no picture
            self.facts("image", Carried("warm-up", b"none"))

    def _file(self, part: Part, key: str) -> Carried:
        content = part.content or self.bytes(part.text, part.param)
        if not content:
            raise wrong(f"{part.param}: is empty", part.param)
        if len(content) > self.limits.medium:
            what = f"{part.param}: has more than {self.limits.medium:,} bytes"
            raise ApiError(413, what, code="file_too_large", param=part.param)
        file = Carried(f"{key}/{part.param}", content)
        try:
            found = self.facts(part.modality, file)
        except UserError as error:
            what = f"{part.param}: {error.what}"
            raise wrong(what, part.param, "invalid_file") from None
        self._check(found, part)
        return file

    def bytes(self, text: str, param: str) -> bytes:
        """What a URL, a `data:` URL or base64 stands for.

        Raises:
          ApiError: it is none of them, or of a host that is not fetched from.
        """
        start = DATA.match(text)
        if start:
            packed = start[1].lower().endswith(";base64")
            return _base64(text[start.end() :], param) if packed else _percent(text, start.end())
        if SCHEME.match(text):
            return self.fetch(text, param)
        return _base64(text, param)

    def _check(self, found: Facts, part: Part) -> None:
        most = self.limits
        seconds = most.sound_seconds if part.modality == "speech" else most.clip_seconds
        for what, has, may in (
            ("pixels", found.pixels, most.pixels),
            ("frames", found.frames, most.frames),
            ("seconds", found.seconds, seconds),
        ):
            if has > may:
                told = f"{part.param}: has {has:,.10g} {what}, more than {may:,.10g}"
                raise wrong(told, part.param, "file_too_large")


def _base64(text: str, param: str) -> bytes:
    try:
        return base64.b64decode(text.translate(SPACE).encode("ascii"), validate=True)
    except (binascii.Error, ValueError):
        raise wrong(f"{param}: is neither a data: URL nor base64", param) from None


def _percent(text: str, start: int) -> bytes:
    return urllib.parse.unquote_to_bytes(text[start:])
