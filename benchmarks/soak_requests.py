"""The requests of `serve_soak.py`: valid ones, broken ones, and ones that are too large."""

from __future__ import annotations

import base64
import dataclasses
import io
import itertools
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from xllm_jax.data.synthetic_world import motion

CHAT, HEARD = "/v1/chat/completions", "/v1/audio/transcriptions"
JSON_HEAD = (("Content-Type", "application/json"),)
# What the server is started with, so that small requests can be too large.
LIMITS = ("--max_body=0.5", "--max_pixels=250000", "--max_sound_seconds=9", "--max_frames=120")
LIMITS += ("--max_files=4",)
BODY = 500_000
QUESTIONS = ("图中有什么？", "请描述这张图。", "有几个物体？", "红色物体在哪里？", "什么形状？")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
      name: of it, which begins with its kind: text, image, video, speech, both,
        heard, broken or large.
      body: its content; () has none.
      path, method, headers: of HTTP.
      stream: whether the answer comes by server-sent events.
      chunked: whether the body is sent without its length.
    """

    name: str
    body: bytes
    path: str = CHAT
    method: str = "POST"
    headers: tuple[tuple[str, str], ...] = JSON_HEAD
    stream: bool = False
    chunked: bool = False

    @property
    def kind(self) -> str:
        """Its kind."""
        return self.name.partition(" ")[0]

    @property
    def valid(self) -> bool:
        """Whether it has an answer."""
        return self.kind not in ("broken", "large")


def chat(name: str, *parts: dict[str, Any], **fields: Any) -> Asked:
    """A question; `parts` are its content."""
    said: dict[str, Any] = {"messages": [{"role": "user", "content": list(parts)}]}
    said |= {"temperature": 0, "max_tokens": 16} | fields
    return Asked(name, json.dumps(said).encode(), stream=bool(fields.get("stream")))


def words(text: str) -> dict[str, Any]:
    """A part of words."""
    return {"type": "text", "text": text}


def file(kind: str, content: bytes, mime: str) -> dict[str, Any]:
    """A part of a file."""
    return {"type": kind, kind: {"url": f"data:{mime};base64,{base64.b64encode(content).decode()}"}}


def sound(content: bytes) -> dict[str, Any]:
    """A part of a sound, in the form of OpenAI's audio models."""
    told = {"data": base64.b64encode(content).decode(), "format": "flac"}
    return {"type": "input_audio", "input_audio": told}


def form(name: str, content: bytes, reply: str = "json") -> Asked:
    """A request to write a sound down."""
    edge = "edge-of-the-form"
    head = f'--{edge}\r\nContent-Disposition: form-data; name="response_format"\r\n\r\n{reply}\r\n'
    head += f'--{edge}\r\nContent-Disposition: form-data; name="file"; filename="a.flac"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{edge}--\r\n".encode()
    kind = f"multipart/form-data; boundary={edge}"
    return Asked(name, body, HEARD, headers=(("Content-Type", kind),))


@dataclasses.dataclass(frozen=True)
class Files:
    """Contents of the world's files."""

    pictures: Sequence[bytes]
    sounds: Sequence[bytes]
    clips: Sequence[bytes]


def files(world: Path, count: int) -> Files:
    """So many of each kind, at most."""

    def read(pattern: str) -> list[bytes]:
        return [path.read_bytes() for path in sorted(world.glob(pattern))[:count]]

    found = Files(
        read("coco/test/*.jpg"), read("aishell/wav/test/*/*.flac"), read("msrvtt/TestVideo/*.mp4")
    )
    if not (found.pictures and found.sounds and found.clips):
        raise SystemExit(f"{world} is no world: xllm world --output={world}")
    return found


def valid(given: Files, count: int, seed: int = 0) -> list[Asked]:
    """Requests with an answer, a quarter of them drawn with a seed and half of them streamed."""
    rng = random.Random(seed)
    kinds = rng.choices(
        ("text", "image", "speech", "video", "both", "heard"), (4, 3, 2, 1, 1, 1), k=count
    )
    return [_valid(kind, number, given, rng) for number, kind in enumerate(kinds)]


def _valid(kind: str, number: int, given: Files, rng: random.Random) -> Asked:
    name, question = f"{kind} {number}", words(rng.choice(QUESTIONS) * rng.randint(1, 4))
    heard = rng.choice(given.sounds)
    if kind == "heard":
        return form(name, heard, rng.choice(("json", "verbose_json", "text")))
    picture = file("image_url", rng.choice(given.pictures), "image/jpeg")
    clip = file("video_url", rng.choice(given.clips), "video/mp4")
    parts = {
        "text": [question],
        "image": [picture, question],
        "speech": [sound(heard)],
        "video": [clip, question],
        "both": [picture, sound(heard)],
    }
    how: dict[str, Any] = {"stream": rng.random() < 0.5, "max_tokens": rng.randint(2, 24)}
    if rng.random() < 0.25:
        how |= {"temperature": 1.0, "seed": number, "top_p": 0.9}
    return chat(name, *parts[kind], **how)


def broken(given: Files) -> list[Asked]:
    """Requests that are wrong, each in a way of its own."""
    picture, heard, clip = given.pictures[0], given.sounds[0], given.clips[0]
    plain = chat("broken", words("图中有什么？"))
    made = [
        dataclasses.replace(plain, body=plain.body[:-5]),
        dataclasses.replace(plain, body=b"[1, 2]"),
        dataclasses.replace(plain, body=b"\xff\xfe" * 50),
        dataclasses.replace(plain, body=b"[" * 5000),
        dataclasses.replace(plain, body=b'{"messages": []}'),
        dataclasses.replace(plain, headers=(("Content-Type", "text/plain"),)),
        dataclasses.replace(plain, headers=(*JSON_HEAD, ("Host", "example.org"))),
        dataclasses.replace(plain, path="/v1/none"),
        dataclasses.replace(plain, method="DELETE"),
        chat("broken", words("?"), model="gpt-none"),
        chat("broken", words("?"), temperature="hot"),
        chat("broken", words("?"), top_p=7),
        chat("broken", words("?"), max_tokens=-1),
        chat("broken", words("?"), tools=[{"type": "function"}]),
        chat("broken", {"type": "smell", "smell": "x"}),
        chat("broken", file("image_url", picture[: len(picture) // 2], "image/jpeg"), words("?")),
        chat("broken", file("image_url", b"no picture", "image/jpeg"), words("?")),
        chat("broken", file("image_url", heard, "image/jpeg"), words("?"), stream=True),
        chat("broken", {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        chat("broken", {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.jpg"}}),
        chat("broken", {"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}),
        chat("broken", sound(heard[:40])),
        chat("broken", sound(random.Random(0).randbytes(2000))),
        chat("broken", file("video_url", clip[: len(clip) // 3], "video/mp4"), words("?")),
        form("broken", picture),
        form("broken", heard, "stl"),
    ]
    return [dataclasses.replace(one, name=f"broken {n}") for n, one in enumerate(made)]


def large(given: Files) -> list[Asked]:
    """Requests beyond `LIMITS`."""
    picture = file("image_url", given.pictures[0], "image/jpeg")
    wide, long = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (600, 600)).save(wide, "PNG")
    soundfile.write(long, np.zeros(16_000 * 10, np.float32), 16_000, format="FLAC")
    with tempfile.TemporaryDirectory() as folder:
        motion.write_mp4(f"{folder}/film.mp4", np.zeros((130, 32, 32, 3), np.uint8))
        film = Path(folder, "film.mp4").read_bytes()
    padded = chat("large", words("?" + " " * (BODY + 1000)))
    made = [
        padded,
        dataclasses.replace(padded, chunked=True),
        chat("large", file("image_url", wide.getvalue(), "image/png"), words("?")),
        chat("large", file("video_url", film, "video/mp4"), words("?")),
        chat("large", sound(long.getvalue())),
        form("large", long.getvalue()),
        chat("large", *[picture] * 5, words("?")),
        chat("large", words("?"), n=9),
        chat("large", words("问" * 200_001)),
    ]
    return [dataclasses.replace(one, name=f"large {n}") for n, one in enumerate(made)]


def mixed(
    good: Sequence[Asked], bad: Sequence[Asked], huge: Sequence[Asked], count: int, seed: int = 1
) -> Iterator[tuple[Asked, int | None]]:
    """(request, pieces after which its client leaves or None) so many times.

    Of ten requests six are valid and waited for, one to two are left, two are broken and one is too
    large.
    """
    rng = random.Random(seed)
    for _ in itertools.repeat(None, count):
        chance = rng.random()
        if chance < 0.6:
            yield rng.choice(good), None
        elif chance < 0.75:
            yield rng.choice(good), rng.randint(0, 3)
        else:
            yield rng.choice(bad if chance < 0.92 else huge), None
