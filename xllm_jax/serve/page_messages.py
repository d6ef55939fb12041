"""What a chat of the page says, in OpenAI's form, and which files the page takes.

What a file is is read from its first bytes, as the server does; a name matters only where a browser
or gradio looks at it.
"""

from __future__ import annotations

import base64
import html
import mimetypes
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import formats

REFUSED = "The server refuses"  # title of what stands in an answer's place
SHOWN = 64  # entries of a history that are sent again
PARTS = {"image": "image_url", "video": "video_url", "audio": "audio_url"}
SLOTS = {"image": "image", "audio": "speech", "video": "video"}
FILMED = re.compile(rb"theora|OVP80|BBCD\0|fishead\0")  # in the head of an Ogg file
PLACE = re.compile(r"messages\[(\d{1,5})\]\.content\[(\d{1,5})\]")

TYPES = {
    "image": {
        **dict.fromkeys((".jpg", ".jpeg", ".jfif"), "jpeg"),
        **dict.fromkeys((".tif", ".tiff"), "tiff"),
        ".png": "png",
        ".webp": "webp",
        ".bmp": "bmp",
        ".gif": "gif",
    },
    "video": {
        **dict.fromkeys((".mp4", ".m4v"), "mp4"),
        **dict.fromkeys((".mpg", ".mpeg"), "mpeg"),
        **dict.fromkeys((".ts", ".mts", ".m2ts"), "mp2t"),
        **dict.fromkeys((".wmv", ".asf"), "x-ms-asf"),
        ".mov": "quicktime",
        ".3gp": "3gpp",
        ".3g2": "3gpp2",
        ".mkv": "x-matroska",
        ".webm": "webm",
        ".avi": "x-msvideo",
        ".flv": "x-flv",
        ".ogv": "ogg",
    },
    "audio": {
        **dict.fromkeys((".ogg", ".oga", ".opus"), "ogg"),
        **dict.fromkeys((".aif", ".aiff", ".aifc"), "aiff"),
        ".wav": "wav",
        ".flac": "flac",
        ".mp3": "mpeg",
        ".au": "basic",
        ".caf": "x-caf",
        ".w64": "x-w64",
        ".sph": "x-nist",
    },
}
"""Kind -> suffix -> subtype, of all that the server reads."""


def types(kinds: Sequence[str]) -> list[str]:
    """Kinds of files and their suffixes, as gradio and browsers want them."""
    return [*kinds, *(suffix for kind in kinds for suffix in TYPES[kind])]


def register_types() -> None:
    """Tells this process the types of all suffixes: not every machine's list has FLAC or WebP, and
    what has none gradio neither takes nor shows."""
    for kind, known in TYPES.items():
        for suffix, subtype in known.items():
            mimetypes.add_type(f"{kind}/{subtype}", suffix)


def kind(file: str) -> str:
    """'image', 'video', 'audio' or '' of a file, by its first bytes."""
    with open(file, "rb") as opened:
        head = opened.read(formats.HEAD)
    if head.startswith(b"OggS"):
        return "video" if FILMED.search(head) else "audio"
    for name, slot in SLOTS.items():
        try:
            formats.check(file, slot, head)
        except UserError:
            continue
        return name
    return ""


def parts(text: str, files: Sequence[str]) -> list[dict[str, Any]]:
    """A question in OpenAI's form; each file with its name, which the server does not look at.

    Raises:
      UserError: a file that is neither a picture nor a clip nor a sound; names it.
    """
    found: list[dict[str, Any]] = []
    for file in files:
        name = PARTS.get(kind(file))
        content = Path(file).read_bytes()
        if name is None:
            what = "is of no format that can be read" if content else "is empty"
            raise UserError(f"{Path(file).name}: {what}")
        packed = base64.b64encode(content).decode()
        found.append(
            {"type": name, name: {"url": f"data:;base64,{packed}"}, "name": Path(file).name}
        )
    return [*found, *([{"type": "text", "text": text}] if text.strip() else [])]


def named(what: str, messages: Sequence[Mapping[str, Any]]) -> str:
    """What the server says, with a file's name instead of its place in the messages."""

    def name(place: re.Match[str]) -> str:
        try:
            return str(messages[int(place[1])]["content"][int(place[2])]["name"])
        except (IndexError, KeyError):
            return place[0]

    return PLACE.sub(name, what)


def past(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The chat so far in OpenAI's form; one message for each side at a time.

    Questions that were refused, by the server or for a file that is none, are left out, or all that
    follow would be refused, too.
    """
    found: list[dict[str, Any]] = []
    for entry in history[-SHOWN:]:
        role = entry["role"]
        if (entry.get("metadata") or {}).get("title") == REFUSED:
            if found and found[-1]["role"] == "user":
                found.pop()
            continue
        try:
            content = parts(*_split(entry["content"]))
        except UserError:
            content = []
        if role == "assistant":
            content = [
                part | {"text": html.unescape(part["text"])}
                for part in content
                if part["type"] == "text"
            ]
        if found and found[-1]["role"] == role:
            found[-1]["content"] += content
        else:
            found.append({"role": role, "content": content})
    return [message for message in found if message["content"]]


def _split(content: object) -> tuple[str, list[str]]:
    """(words, files) of an entry of gradio's history."""
    texts, files = [], []
    for piece in _pieces(content):
        if isinstance(piece, str):
            texts.append(piece)
        elif isinstance(piece, Mapping) and piece.get("type") == "text":
            texts.append(piece["text"])
        elif isinstance(piece, Mapping):
            inner = piece.get("file") or piece
            path = inner.get("path") if isinstance(inner, Mapping) else None
            files += [path] if path else []
    return "\n".join(texts), files


def _pieces(content: object) -> Iterator[object]:
    yield from content if isinstance(content, list | tuple) else [content]
