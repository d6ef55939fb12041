"""`POST /v1/audio/transcriptions`: what is said in a file, as text, JSON or subtitles."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from fastapi import Request as Incoming
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import speech
from xllm_jax.data.media.paths import Carried
from xllm_jax.serve import errors, hearing, openai_schema, service
from xllm_jax.serve.errors import ApiError, wrong
from xllm_jax.serve.hearing import Character, Heard
from xllm_jax.serve.media_input import Part
from xllm_jax.serve.openai_schema import SpeechRequest
from xllm_jax.serve.service import Service

FIELDS = 20  # of a form
FIELD_BYTES = 4096
CUE = 16  # characters of a subtitle
PAUSE = 0.8  # seconds that end one
ENDS = "。！？!?；;"


def router(served: Service) -> APIRouter:
    """The route, for one model."""
    routes = APIRouter()

    @routes.post("/v1/audio/transcriptions")
    async def transcribe(incoming: Incoming) -> Response:
        return await _transcribe(served, incoming)

    return routes


async def _transcribe(served: Service, incoming: Incoming) -> Response:
    asked = incoming.state.asked
    served.check_ready()
    if served.ears is None:
        raise wrong("This model hears no speech", "model", "unsupported_modality")
    wanted, content = await _form(incoming)
    openai_schema.check_model(wanted.model, served.card.name)
    part = Part("speech", "file", content=content)
    ((_, file),) = await service.unless_gone(incoming, served.files([part], asked))
    found = await service.unless_gone(incoming, hear(served, file))
    served.tell(asked, "", [found.text])
    return _response(found, wanted.response_format)


async def _form(incoming: Incoming) -> tuple[SpeechRequest, bytes]:
    """(fields, content of the file) of a form."""
    stated = incoming.headers.get("content-type", "").partition(";")[0].strip().lower()
    if stated != "multipart/form-data":
        what = "The content-type is not multipart/form-data"
        raise ApiError(415, what, code="unsupported_media_type")
    try:
        limits: Any = {"max_files": 1, "max_fields": FIELDS, "max_part_size": FIELD_BYTES}
        async with incoming.form(**limits) as form:
            file = form.get("file")
            content = await file.read() if isinstance(file, UploadFile) else b""
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
    except (MultiPartException, ValueError):
        raise wrong("The form cannot be read", code="invalid_form") from None
    except Exception as error:
        if type(error).__name__ == "HTTPException":  # what Starlette makes of the former
            raise wrong("The form cannot be read", code="invalid_form") from None
        raise
    if not content:
        raise wrong("file: is missing or empty", "file")
    return openai_schema.parse(SpeechRequest, fields), content


async def hear(served: Service, file: Carried) -> Heard:
    """What is said in a file.

    Raises:
      ApiError: it cannot be read, or the engine refuses.
    """
    ears = served.ears
    assert ears is not None
    try:
        features = await asyncio.to_thread(ears.load, file)
        times, texts = await service.in_turn(served, ears.times, features)
        text = "" if texts is not None else await _asked(served, file)
    except UserError as error:
        raise errors.of(error) from None
    seconds = len(features) * hearing.FRAME + (speech.WINDOW - speech.HOP) / speech.RATE
    return hearing.heard(text, times, texts, seconds)


async def _asked(served: Service, file: Carried) -> str:
    ticket = served.engine.submit(hearing.question(file))
    return (await service.answers([ticket]))[0].text.strip()


def _response(found: Heard, form: str) -> Response:
    if form == "text":
        return PlainTextResponse(f"{found.text}\n")
    if form == "srt":
        return PlainTextResponse(srt(found.characters))
    if form == "json":
        return JSONResponse({"text": found.text})
    return JSONResponse(verbose(found))


def verbose(found: Heard) -> dict[str, Any]:
    """`verbose_json`: with the time of every character, and of every subtitle."""
    segments = [
        {"id": number, "start": one[0].start, "end": one[-1].end, "text": _text(one)}
        for number, one in enumerate(cues(found.characters))
    ]
    told = {"task": "transcribe", "language": "chinese", "duration": round(found.seconds, 3)}
    return told | {"text": found.text, "words": words(found.characters), "segments": segments}


def words(characters: Sequence[Character]) -> list[dict[str, Any]]:
    """Characters in OpenAI's form of words."""
    return [
        {"word": one.text, "start": round(one.start, 3), "end": round(one.end, 3)}
        for one in characters
    ]


def cues(characters: Sequence[Character]) -> list[list[Character]]:
    """Characters as subtitles: they end at the end of a sentence, at a pause, or when full."""
    found: list[list[Character]] = []
    for one in characters:
        last = found[-1][-1] if found else None
        fresh = last is None or len(found[-1]) >= CUE or last.text in ENDS
        if fresh or (last and one.end - last.end > PAUSE):
            found.append([])
        found[-1].append(one)
    return found


def srt(characters: Sequence[Character]) -> str:
    """Subtitles in the format of SubRip."""
    return "\n".join(
        f"{number}\n{_clock(one[0].start)} --> {_clock(one[-1].end)}\n{_text(one)}\n"
        for number, one in enumerate(cues(characters), 1)
    )


def _text(characters: Sequence[Character]) -> str:
    return "".join(one.text for one in characters)


def _clock(seconds: float) -> str:
    whole = round(seconds * 1000)
    minutes, rest = divmod(whole, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
