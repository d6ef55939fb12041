"""A request on its way through the engine."""

from __future__ import annotations

import dataclasses
import time

from xllm_jax.inference.file_encoder import Read
from xllm_jax.inference.media_cache import Encoded
from xllm_jax.serve.entry import Entry
from xllm_jax.serve.request import Event, Ticket, Usage
from xllm_jax.serve.text_stream import TextStream

Medium = tuple[str, str]  # (modality, path)


@dataclasses.dataclass(eq=False)
class Job:
    """What the engine knows of a request; its threads hand it from one to the next.

    Attributes:
      ticket: who asked.
      stream: the answer's text.
      submitted: when, by the monotonic clock; `entered`: when it got a slot, 0 before.
      files: of the request, read or encoded.
      entry: its prompt, once its files are encoded, until it has a slot; `key` of it.
      prompt: the same to the end, where the answer may hold pictures.
      answer: tokens chosen so far, without the end.
      prompt_tokens: of it, media included.
      most: tokens that its answer may have, and `tokens` those chosen so far, the end included.
      over: whether its last event has been told.
    """

    ticket: Ticket
    stream: TextStream
    most: int
    submitted: float = dataclasses.field(default_factory=time.monotonic)
    entered: float = 0.0
    files: dict[Medium, Read | Encoded] = dataclasses.field(default_factory=dict)
    entry: Entry | None = None
    key: str = ""
    prompt: Entry | None = None
    answer: list[int] = dataclasses.field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    over: bool = False

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.prompt_tokens, self.tokens)

    def end(self, event: Event) -> None:
        """Tells the last event."""
        self.over = True
        self.ticket.put(dataclasses.replace(event, usage=self.usage))
