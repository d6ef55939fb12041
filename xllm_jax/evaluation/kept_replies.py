"""Questions to an OpenAI-compatible API whose every reply is kept, so that it is paid for once.

    FOLDER/ab/….json     {"about": …, "messages", "failed": [why it was asked again, …], and
                          "reply", or "refused": why}

The same questions read the replies that are there without the API.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from xllm_jax.core import atomic, bounded, chat_endpoint, checksum
from xllm_jax.core.chat_endpoint import Client, Endpoint, GivenUp, Refused
from xllm_jax.core.progress import Bar

Messages = Sequence[Mapping[str, str]]


class Question(NamedTuple):
    """What is asked, and what is written beside the reply for people."""

    messages: Messages
    about: Mapping[str, Any]


class Replies:
    """Asks, and keeps what was answered.

    Args:
      folder: of the replies.
      model: that answers, its name and whatever else its replies depend on; JSON.
      endpoint: where it answers; None asks nobody.
    """

    def __init__(self, folder: Path, model: object, endpoint: Endpoint | None):
        self._folder, self._model, self._endpoint = folder, model, endpoint

    @property
    def identity(self) -> str:
        """Hash of what replies depend on besides the questions; an API may move."""
        return checksum.of_json(self._model)

    def file(self, messages: Messages) -> Path:
        """Where the reply to a question is kept."""
        name = checksum.of_json([self.identity, [dict(one) for one in messages]])
        return self._folder / name[:2] / f"{name}.json"

    def ask(self, questions: Iterable[Question]) -> int:
        """Asks what has not been answered, and returns how many questions stay open.

        Raises:
          UserError: the API cannot be used, or has answered nothing at all.
        """
        todo = {self.file(one.messages): one for one in questions}
        todo = {file: one for file, one in todo.items() if not file.is_file()}
        if not todo or self._endpoint is None:
            return len(todo)
        client, failures = Client(self._endpoint), []
        with ThreadPoolExecutor(self._endpoint.parallel) as pool:
            try:
                with Bar(total=len(todo), desc="replies", unit="questions") as bar:
                    for error in pool.map(lambda pair: _kept(client, *pair), todo.items()):
                        failures += [error] if error else []
                        bar.update(1)
            except BaseException:
                client.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if len(failures) == len(todo):
            raise failures[0]
        return len(failures)

    def text(self, messages: Messages) -> str | None:
        """What was replied, '' by one that refuses; None where the question is open."""
        file = self.file(messages)
        if not file.is_file():
            return None
        kept = bounded.read_json(file)
        return chat_endpoint.text(kept["reply"]) if "reply" in kept else ""


def _kept(client: Client, file: Path, question: Question) -> GivenUp | None:
    """Keeps the reply to a question; the error of one that is given up."""
    about = {"about": question.about, "messages": [dict(one) for one in question.messages]}
    try:
        reply, failed = client.ask(question.messages)
    except GivenUp as error:
        return error
    except Refused as error:
        atomic.write_json(file, {**about, "refused": str(error)})
        return None
    atomic.write_json(file, {**about, "failed": failed, "reply": reply})
    return None
