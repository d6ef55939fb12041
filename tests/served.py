"""A server in a thread, on a free port of this machine, with small limits."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import soundfile
import uvicorn
from fake_engine import FakeEngine
from PIL import Image

from xllm_jax.core.stage import Data
from xllm_jax.data.media import speech
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.media.paths import Carried
from xllm_jax.serve import app
from xllm_jax.serve.fetch import Fetcher
from xllm_jax.serve.limits import Limits
from xllm_jax.serve.media_input import MediaReader
from xllm_jax.serve.metrics import Metrics
from xllm_jax.serve.service import Card, Service

LIMITS = Limits(
    body=2_000_000,
    bodies=5_000_000,
    media=4,
    medium=1_000_000,
    pixels=100_000,
    frames=20,
    clip_seconds=5,
    sound_seconds=3,
    messages=16,
    text=5_000,
    choices=4,
    receive_seconds=2,
    decode_seconds=20,
)


class FakeEars:
    """Hears a character in every 160 ms of a sound, and which one from how loud it is."""

    def __init__(self):
        self.pause = 0.0

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def load(self, file: str) -> np.ndarray:
        """Filterbanks, as of a model."""
        return speech.load(file)

    def times(self, features: np.ndarray) -> tuple[list[float], list[str]]:
        """See `hearing.Ears`."""
        time.sleep(self.pause)
        ends = range(16, len(features), 16)
        loud = [int(abs(features[n - 16 : n, 3].sum())) % 6 for n in ends]
        return [n / 100 for n in ends] + [len(features) / 100], [
            *("一二三四五六"[n] for n in loud),
            "",
        ]


class FakeEasel:
    """Draws a square of the color that a picture's embeddings are."""

    def __init__(self):
        self.sizes = {"image": ((24, 24),)}

    def size(self, said: str | None, modality: str) -> tuple[int, int]:
        """See `Easel`."""
        return self.sizes[modality][0]

    def draw(self, picture: Any, seed: int, size: tuple[int, int]) -> Future[bytes]:
        """See `Easel`."""
        done: Future[bytes] = Future()
        done.set_result(square(*size, picture.embeddings))
        return done


def service(engine: Any, decoders: Decoders, limits: Limits = LIMITS, **changes: Any) -> Service:
    """A service around an engine; `changes` are further fields."""
    fetch = changes.pop("fetch", None) or Fetcher((), limits.medium, limits.fetch_seconds)
    media = MediaReader(limits, fetch, decoders.facts)
    card = changes.pop("card", Card("mini", ("image", "video", "speech")))
    return Service(engine, card, limits, media, Metrics(engine.metrics), **changes)


@contextlib.contextmanager
def decoders() -> Iterator[Decoders]:
    """Workers that read headers."""
    made = Decoders(Data(deadline=LIMITS.decode_seconds, memory=2, threads=1))
    try:
        made.facts("image", Carried("first", picture()))  # starts one, which takes seconds
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def running(application: Any, **options: Any) -> Iterator[str]:
    """The address of an application that listens while the block runs."""
    config = uvicorn.Config(
        application, port=0, log_config=None, ws="websockets-sansio", http="h11", **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def fake(
    workers: Decoders, pause: float = 0.0, most: int = 100, **options: Any
) -> Iterator[tuple[str, FakeEngine, Service]]:
    """A server with a fake engine: its address, the engine, the service."""
    engine = FakeEngine(pause, most)
    engine.start()
    of_app = {name: options.pop(name) for name in ("keys", "names", "log") if name in options}
    of_app.setdefault("log", sys.stderr)
    made = service(engine, workers, **options)
    with running(app.create(made, **of_app)) as url:
        yield url, engine, made


def wait_for(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something is true; fails if it does not come."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)


def picture(width: int = 20, height: int = 10, color: str = "red") -> bytes:
    """A PNG file."""
    content = io.BytesIO()
    Image.new("RGB", (width, height), color).save(content, "PNG")
    return content.getvalue()


square = picture


def sound(seconds: float = 0.5, pitch: float = 440.0) -> bytes:
    """A WAV file."""
    content = io.BytesIO()
    samples = 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(16_000 * seconds)) / 16_000)
    soundfile.write(content, samples, 16_000, format="WAV")
    return content.getvalue()
