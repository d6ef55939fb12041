"""WebSocket `/v1/realtime/transcriptions`: sound comes in pieces, characters go out as CIF fires.

The speech encoder reads a whole utterance, so every `STEP` seconds all that has come is encoded
again: what is told in between may change, and the last text is that of the whole utterance, to the
letter what `/v1/audio/transcriptions` gives for it. A character is told at the earliest when the
frame that fires it has come, and at the latest `STEP` seconds and one encoding later; where
encoding takes longer than `STEP`, steps are left out.

In: binary messages of 16 kHz mono samples of 16 bits, little-endian, or
`{"type": "input_audio_buffer.append", "audio": BASE64}`; `{"type": "input_audio_buffer.commit"}`
ends an utterance, `{"type": "input_audio_buffer.clear"}` drops it.
Out: `{"type": "transcription.delta"}` and, behind a commit, `{"type": "transcription.completed"}`,
each with the whole `text` so far, its `words` with their times, and `audio_seconds`; or
`{"type": "error", "error": …}`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from xllm_jax.core import bounded
from xllm_jax.data.media import speech
from xllm_jax.data.media.paths import Carried
from xllm_jax.serve import hearing, security, transcriptions
from xllm_jax.serve.errors import ApiError, wrong
from xllm_jax.serve.hearing import Heard
from xllm_jax.serve.service import Service

STEP = 0.5  # seconds of sound between two texts
SAMPLE = 2  # bytes
IDLE_SECONDS = 60.0  # without a message, after which the session ends
DONE, TOO_LONG, BUSY = 1000, 1009, 1013  # codes of a close


def router(served: Service) -> APIRouter:
    """The route, for one model."""
    routes = APIRouter()

    @routes.websocket("/v1/realtime/transcriptions")
    async def transcribe(socket: WebSocket) -> None:
        offered = socket.headers.get("sec-websocket-protocol", "")
        known = [one.strip() for one in offered.split(",") if security.PROTOCOL not in one]
        await socket.accept(subprotocol=next(filter(None, known), None))
        served.metrics.session(1)
        try:
            await Session(served, socket).run()
        finally:
            served.metrics.session(-1)

    return routes


class Session:
    """One client's utterances, one after another.

    Args:
      served: the model.
      socket: accepted.
    """

    def __init__(self, served: Service, socket: WebSocket):
        self.served, self.socket, self.id = served, socket, socket.state.asked.id
        self.samples = bytearray()
        self.told = 0  # bytes at the last text
        self.work: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Answers until the client leaves, or does what it must not."""
        code = DONE
        try:
            self.served.check_ready()
            if self.served.ears is None:
                raise wrong("This model hears no speech", "model", "unsupported_modality")
            while True:
                message = await asyncio.wait_for(self.socket.receive(), IDLE_SECONDS)
                if message["type"] == "websocket.disconnect":
                    return
                await self.take(message)
        except TimeoutError:
            pass
        except WebSocketDisconnect:
            return
        except ApiError as error:
            code = BUSY if error.status >= 500 else TOO_LONG if error.status == 413 else 1008
            await self.send({"type": "error"} | error.body())
        finally:
            await self.stop()
        with contextlib.suppress(RuntimeError):  # the client has closed it
            await self.socket.close(code)

    async def take(self, message: Mapping[str, Any]) -> None:
        """One message of the client."""
        content = message.get("bytes")
        if content is None:
            kind, content = _command(message.get("text") or "")
            if kind == "commit":
                return await self.complete()
            if kind == "clear":
                return await self.clear()
        self.samples += content
        most = int(self.served.limits.sound_seconds * speech.RATE) * SAMPLE
        if len(self.samples) > most:
            what = f"The utterance has more than {self.served.limits.sound_seconds:g} seconds"
            raise ApiError(413, what, code="file_too_large")
        fresh = len(self.samples) - self.told
        if fresh >= STEP * speech.RATE * SAMPLE and (self.work is None or self.work.done()):
            self.told = len(self.samples)
            self.work = asyncio.create_task(self.tell(bytes(self.samples)))

    async def tell(self, samples: bytes) -> None:
        """Sends what is heard so far; where nothing can be heard yet, nothing."""
        with contextlib.suppress(ApiError, RuntimeError, WebSocketDisconnect):
            await self.say("transcription.delta", await self.hear(samples))

    async def complete(self) -> None:
        """Sends what the whole utterance says, and begins another one."""
        await self.stop()
        samples = bytes(self.samples)
        await self.clear()
        try:
            await self.say("transcription.completed", await self.hear(samples))
        except ApiError as error:
            if error.status >= 500:
                raise
            await self.send({"type": "error"} | error.body())

    async def clear(self) -> None:
        """Drops what has come."""
        await self.stop()
        self.samples.clear()
        self.told = 0

    async def stop(self) -> None:
        """Breaks off what is being heard."""
        if self.work:
            self.work.cancel()
            await asyncio.gather(self.work, return_exceptions=True)
        self.work = None

    async def hear(self, samples: bytes) -> Heard:
        """What is said; errors as of `transcriptions.hear`."""
        whole = samples[: len(samples) // SAMPLE * SAMPLE]
        file = Carried(f"{self.id}/audio", hearing.wav(whole))
        return await transcriptions.hear(self.served, file)

    async def say(self, kind: str, found: Heard) -> None:
        """Sends a text with its times."""
        told = {"type": kind, "text": found.text, "words": transcriptions.words(found.characters)}
        await self.send(told | {"audio_seconds": round(found.seconds, 3)})

    async def send(self, value: dict[str, Any]) -> None:
        """Sends JSON, unless the client has left."""
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
            await self.socket.send_json(value)


def _command(text: str) -> tuple[str, bytes]:
    """('append', 'commit' or 'clear'; samples) of a message in JSON.

    Raises:
      ApiError: it is none of them.
    """
    try:
        found = bounded.parsed(text.encode())
    except (ValueError, RecursionError):
        found = None
    kind = found.get("type") if isinstance(found, dict) else None
    name = str(kind).removeprefix("input_audio_buffer.")
    if name in ("commit", "clear"):
        return name, b""
    audio = found.get("audio") if isinstance(found, dict) else None
    if name != "append" or not isinstance(audio, str):
        raise wrong("The message is neither sound nor a known command", "type")
    try:
        return name, base64.b64decode(audio, validate=True)
    except (binascii.Error, ValueError):
        raise wrong("audio: is no base64", "audio") from None
