"""`POST /v1/chat/completions`: one answer or several, whole or as they come."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, TypeVar

from fastapi import APIRouter
from fastapi import Request as Incoming
from fastapi.responses import JSONResponse, Response
from sse_starlette import EventSourceResponse

from xllm_jax.serve import conversation, openai_schema, service
from xllm_jax.serve.errors import ApiError
from xllm_jax.serve.gate import Asked
from xllm_jax.serve.openai_schema import ChatRequest, Form
from xllm_jax.serve.request import Answer, Event, Ticket, Usage
from xllm_jax.serve.service import Service

T = TypeVar("T", bound=openai_schema.Body)
PING_SECONDS = 15  # between comments that keep a silent stream open
SEND_SECONDS = 60  # that a client may take to read a piece


def router(served: Service) -> APIRouter:
    """The route, for one model."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def complete(incoming: Incoming) -> Response:
        return await _complete(served, incoming)

    return routes


async def _complete(served: Service, incoming: Incoming) -> Response:
    began, asked = time.monotonic(), incoming.state.asked
    served.check_ready()
    wanted = await body(incoming, ChatRequest)
    openai_schema.check_model(wanted.model, served.card.name)
    wanted.check()
    samplings = wanted.samplings(served.limits.choices)
    said = conversation.read(wanted.messages, served.card.modalities, served.limits)
    reading = served.files(said.parts, asked)
    media = await service.unless_gone(incoming, reading)
    example = said.example(asked.id, media)
    tickets = served.submit(asked, example, samplings)
    asked.notes |= {"files": len(media), "n": len(tickets), "stream": wanted.stream}
    form = Form(asked.id, served.card.name)
    if wanted.stream:
        usage = bool(wanted.stream_options and wanted.stream_options.include_usage)
        stream = _Stream(served, asked, form, tickets, usage, wanted.logprobs is True)
        stream.question = example.instruction
        return await stream.response(began)
    found = await service.unless_gone(incoming, service.answers(tickets, served.drawn))
    served.metrics.first(time.monotonic() - began)
    served.tell(asked, example.instruction, [one.text for one in found])
    choices = [_choice(number, one) for number, one in enumerate(found)]
    if not wanted.logprobs:
        choices = [one | {"logprobs": None} for one in choices]
    usage = total([one.usage for one in found])
    note(asked, usage, sum(len(one.pictures) for one in found))
    return JSONResponse(form.completion(choices, usage))


async def body(incoming: Incoming, kind: type[T]) -> T:
    """The JSON of a request.

    Raises:
      ApiError: it is of another form, or said to be.
    """
    stated = incoming.headers.get("content-type", "").partition(";")[0].strip().lower()
    if stated != "application/json":  # a page of another origin may send other kinds unasked
        what = "The content-type is not application/json"
        raise ApiError(415, what, code="unsupported_media_type")
    return openai_schema.parse(kind, await incoming.body())


def _choice(number: int, answer: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.pictures:
        message["images"] = images(answer.pictures)
    return {
        "index": number,
        "message": message,
        "logprobs": openai_schema.logprobs(answer.tokens),
        "finish_reason": answer.finish_reason,
    }


def images(files: Sequence[bytes]) -> list[dict[str, Any]]:
    """PNG files of an answer as `data:` URLs, in the form of the parts of a question."""
    urls = [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in files]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def total(usages: Sequence[Usage | None]) -> Usage:
    """Tokens of all answers to one prompt, which counts once."""
    known = [one for one in usages if one]
    read = max((one.prompt_tokens for one in known), default=0)
    return Usage(read, sum(one.completion_tokens for one in known))


def note(asked: Asked, usage: Usage, pictures: int = 0) -> None:
    """Adds the numbers of tokens and of pictures to the request's line in the log."""
    asked.notes |= {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
    asked.notes |= {"pictures": pictures} if pictures else {}


class _Stream:
    """Answers as they come, by server-sent events."""

    question = ""
    pictures = 0

    def __init__(
        self,
        served: Service,
        asked: Asked,
        form: Form,
        tickets: Sequence[Ticket],
        usage: bool,
        logprobs: bool,
    ):
        self.served, self.asked, self.form, self.tickets = served, asked, form, tickets
        self.usage, self.logprobs = usage, logprobs
        self.used: list[Usage | None] = []
        self.texts = [""] * len(tickets)

    async def response(self, began: float) -> Response:
        """The response, once the first piece has come; before that an error has its own status.

        Args:
          began: when the request came.
        """
        source = service.events(self.tickets, self.served.drawn)
        try:
            first = await anext(source)
        except BaseException:
            await source.aclose()
            raise
        self.served.metrics.first(time.monotonic() - began)
        pieces = self.pieces(first, source)
        return EventSourceResponse(pieces, ping=PING_SECONDS, send_timeout=SEND_SECONDS, sep="\n")

    async def pieces(
        self, first: tuple[int, Event], source: AsyncGenerator[tuple[int, Event], None]
    ) -> AsyncGenerator[dict[str, str], None]:
        """What is sent, piece by piece."""
        try:
            for number in range(len(self.tickets)):
                delta = {"role": "assistant", "content": ""}
                yield _data(self.form.chunk([_delta(number, delta)]))
            async for number, event in _behind(first, source):
                yield _data(self.form.chunk([self.choice(number, event)]))
            if self.usage:
                yield _data(self.form.chunk([], total(self.used)))
            yield {"data": "[DONE]"}
        except ApiError as error:
            yield _data(error.body())
        finally:
            service.cancel(self.tickets)
            note(self.asked, total(self.used), self.pictures)
            self.served.tell(self.asked, self.question, self.texts)

    def choice(self, number: int, event: Event) -> dict[str, Any]:
        """The piece that an event is."""
        delta: dict[str, Any] = {"content": event.text} if event.text else {}
        self.texts[number] += event.text
        if event.pictures:
            delta["images"] = images(event.pictures)
            self.pictures += len(event.pictures)
        if event.finish_reason is not None:
            self.used.append(event.usage)
        told = _delta(number, delta, event.finish_reason)
        if self.logprobs:
            told["logprobs"] = openai_schema.logprobs(event.tokens)
        return told


def _delta(number: int, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": reason}


def _data(value: dict[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(value, ensure_ascii=False)}


async def _behind(
    first: tuple[int, Event], source: AsyncGenerator[tuple[int, Event], None]
) -> AsyncGenerator[tuple[int, Event], None]:
    yield first
    async for pair in source:
        yield pair
