"""OpenAI's chat interface as types: what a request may say, and the form of what is answered."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import pydantic

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError
from xllm_jax.serve import errors
from xllm_jax.serve.errors import ApiError, wrong
from xllm_jax.serve.limits import Limits
from xllm_jax.serve.request import Sampling, Token, Usage

T = TypeVar("T", bound=pydantic.BaseModel)


class StreamOptions(pydantic.BaseModel):
    """How a stream ends."""

    include_usage: bool = False


class Body(pydantic.BaseModel):
    """A request; numbers are finite, texts are UTF-8, and `true` is no number.

    Fields that are not known, such as `user`, change nothing.
    """

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


HOTTEST = 2  # temperature, as OpenAI has it


class ChatRequest(Body):
    """`POST /v1/chat/completions`."""

    model: str = ""
    messages: list[dict[str, Any]]
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Refused where they would change the answer.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    audio: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises ApiError for a field that this server cannot heed."""
        form = (self.response_format or {}).get("type", "text")
        unheeded = {
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "tools": self.tools,
            "functions": self.functions,
            "response_format": form != "text",
            "audio": self.audio,
        }
        for name, value in unheeded.items():
            if value:
                what = f"{name}: this server does not support it"
                raise wrong(what, name, "unsupported_parameter")

    def samplings(self, most: int) -> list[Sampling]:
        """How each of the `n` answers is decoded; the first with the seed, the others count on.

        Args:
          most: answers to one request.

        Raises:
          ApiError: a value that makes no sense.
        """
        choices = 1 if self.n is None else self.n
        if not 0 < choices <= most:
            raise wrong(f"n: is not between 1 and {most}", "n")
        if (self.temperature or 0) > HOTTEST:
            raise wrong(f"temperature: is above {HOTTEST}", "temperature")
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs: needs logprobs", "top_logprobs")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        longest = self.max_completion_tokens
        try:
            first = Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                seed=secrets.randbits(32) if self.seed is None else self.seed,
                max_tokens=self.max_tokens if longest is None else longest,
                stop=stop,
                logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            )
            return [dataclasses.replace(first, seed=first.seed + n) for n in range(choices)]
        except UserError as error:
            raise errors.of(error) from None


class SpeechRequest(pydantic.BaseModel):
    """`POST /v1/audio/transcriptions`, the fields of its form beside the file."""

    model: str = ""
    response_format: Literal["json", "text", "srt", "verbose_json"] = "json"
    stream: Literal["", "false"] = ""


class ImageRequest(Body):
    """`POST /v1/images/generations`."""

    model: str = ""
    prompt: str
    n: int | None = None
    size: str | None = None
    seed: int | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png"] | None = None
    # Refused where they would change the answer.
    stream: bool | None = None
    background: str | None = None

    def count(self, limits: Limits) -> int:
        """How many pictures are wanted.

        Raises:
          ApiError: too many or none, no prompt, or a field that this server cannot heed.
        """
        if self.response_format == "url":
            raise wrong("response_format: only b64_json", "response_format")
        for name, one in (("stream", self.stream), ("background", self.background)):
            if one not in (None, False, "", "auto", "opaque"):
                what = f"{name}: this server does not support it"
                raise wrong(what, name, "unsupported_parameter")
        count = 1 if self.n is None else self.n
        if not 0 < count <= limits.choices:
            raise wrong(f"n: is not between 1 and {limits.choices}", "n")
        if not self.prompt.strip() or len(self.prompt) > limits.text:
            raise wrong("prompt: is empty or too long", "prompt")
        return count


def parse(kind: type[T], body: bytes | dict[str, Any]) -> T:
    """A request of a kind.

    Args:
      kind: of the request.
      body: JSON in UTF-8, or the fields of a form.

    Raises:
      ApiError: it is none; names the field, and repeats no value.
    """
    try:
        found = bounded.parsed(body) if isinstance(body, bytes) else body
        if isinstance(body, bytes):
            _utf8(found)
    except (ValueError, RecursionError):
        raise wrong(
            "The body is no JSON in UTF-8, or holds too much", code="invalid_json"
        ) from None
    if not isinstance(found, dict):
        raise wrong("The body is no JSON object", code="invalid_json")
    try:
        return kind.model_validate(found)
    except pydantic.ValidationError as error:
        told = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = ".".join(map(str, told["loc"]))[:100]
        raise wrong(f"{param}: {told['msg']}", param) from None


def _utf8(value: object) -> None:
    """Raises ValueError where a text holds half a character, as "\\ud800" in JSON makes it."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, str):
            one.encode("utf-8")
        elif isinstance(one, dict):
            todo += [*one.keys(), *one.values()]
        elif isinstance(one, list):
            todo += one


@dataclasses.dataclass(frozen=True)
class Form:
    """What all pieces of one answer have in common.

    Attributes:
      id: of the answer.
      model: its name.
      created: seconds since 1970.
    """

    id: str
    model: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def completion(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """A whole answer."""
        return self._of("chat.completion") | {"choices": list(choices), "usage": usages(usage)}

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: Usage | None = None
    ) -> dict[str, Any]:
        """A piece of a stream."""
        told = {"choices": list(choices)} | ({"usage": usages(usage)} if usage else {})
        return self._of("chat.completion.chunk") | told

    def _of(self, kind: str) -> dict[str, Any]:
        told = {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created}
        return told | {"model": self.model}


def usages(usage: Usage) -> dict[str, int]:
    """Tokens that an answer took."""
    read, written = usage.prompt_tokens, usage.completion_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """The log-probabilities of tokens."""

    def one(text: str, logprob: float) -> dict[str, Any]:
        # JSON has no infinity; -9999 is what OpenAI writes for a token that is all but impossible.
        return {
            "token": text,
            "logprob": max(logprob, -9999.0),
            "bytes": list(text.encode("utf-8", "replace")),
        }

    content = [
        one(token.text, token.logprob)
        | {"top_logprobs": [one(other.text, other.logprob) for other in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def check_model(asked: str, known: str) -> None:
    """Raises ApiError where a request names another model; '' is the one there is."""
    if asked not in ("", known):
        what = f"The model does not exist; this server has {known}"
        raise ApiError(404, what, code="model_not_found", param="model")
