"""What the pictures in answers are to be drawn from, read beside decoding.

The LLM reads a prompt and its answer once more, in one row of its bucket's shape, and a projection
reads its states at the signal tokens (`inference/replies.py`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from xllm_jax.core.batch import ConversationBatch, Media
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.text import signal_runs
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference import replies
from xllm_jax.inference.decoding import Decoding
from xllm_jax.inference.replies import Picture
from xllm_jax.models.xllm import XLLM
from xllm_jax.serve.entry import Entry, Plan, empty_entry
from xllm_jax.serve.job import Job
from xllm_jax.serve.request import Defect, Event

MOST = 4  # pictures of an answer; more are left out

Done = Callable[[Job, Event], None]


class PictureReader:
    """A thread that completes the last events of answers with pictures.

    Args:
      model: with its outputs.
      params: {part: parameters}.
      registry: of the signal tokens.
      family: of the LLM.
      plan: shapes of prompts and answers.
      done: is called with every job and its last event.
    """

    def __init__(
        self,
        model: XLLM,
        params: Params,
        registry: signal_runs.Registry,
        family: LLMFamily,
        plan: Plan,
        done: Done,
    ):
        # Media come as embeddings in their places, under the name of any modality.
        self._model, self._params = model.encoded, params
        self._registry, self._family, self._plan, self._done = registry, family, plan, done
        self._how = Decoding.of(family, max_new_tokens=plan.max_tokens)
        self._jobs: queue.SimpleQueue[tuple[Job, Event] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pictures", daemon=True)

    def warm_up(self) -> None:
        """Compiles for every bucket and modality, and begins."""
        for bucket in self._plan.buckets:
            entry = empty_entry(self._family, self._plan, bucket)
            for name in self._registry:
                self.read(entry, self._registry[name].ids)
        self._thread.start()

    def asked(self, answer: Sequence[int]) -> bool:
        """Whether an answer holds a picture."""
        return bool(self._runs(answer))

    def put(self, job: Job, event: Event) -> None:
        """Takes a job whose answer holds a picture, and its last event; returns at once."""
        self._jobs.put((job, event))

    def close(self) -> None:
        """Ends the thread when it has done what it was given."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def read(self, entry: Entry, answer: Sequence[int]) -> tuple[Picture, ...]:
        """The first `MOST` pictures of an answer, in order.

        Args:
          entry: its prompt.
          answer: its tokens, without the end.
        """
        runs = self._runs(answer)[:MOST]
        if not runs:
            return ()
        kept = list(answer[: runs[-1][1][-1] + 1])
        drawn = replies.read(
            self._model, self._params, self._batch(entry), [kept], self._registry, self._how, MOST
        )
        left = {name: iter(rows[0]) for name, rows in drawn.items()}
        return tuple(Picture(name, next(left[name])) for name, _ in runs)

    def _runs(self, answer: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
        """Whole runs of an answer, as of `signal_runs.split`."""
        found = signal_runs.split(answer, self._registry)
        return [one for one in found if one[0] and one[1][-1] < len(answer)]

    def _batch(self, entry: Entry) -> ConversationBatch:
        count, width = entry.ids.shape[1], self._plan.width
        segments = (np.arange(count) < entry.size)[None].astype(np.int32)
        nothing: Any = np.zeros((1, 0), np.int32)
        media = {}
        if self._model.modalities:
            values = np.zeros((1, count, width), np.float32) if entry.media is None else entry.media
            lengths = np.ones((1, count), np.int32)
            name = self._model.modalities[0][0]
            media = {name: Media(values[:, :, None], lengths, None, entry.index)}
        return ConversationBatch(
            ids=entry.ids,
            positions=entry.positions,
            segments=segments,
            context=entry.context,
            answer_index=nothing,
            targets=nothing,
            weights=nothing.astype(np.float32),
            media=media,
        )

    def _run(self) -> None:
        while (given := self._jobs.get()) is not None:
            job, event = given
            if job.over:
                continue
            try:
                assert job.prompt is not None
                found = self.read(job.prompt, job.answer)
                self._done(job, Event(finish_reason=event.finish_reason, pictures=found))
            except UserError as error:
                self._done(job, Event(finish_reason="error", error=error))
            except Exception as error:
                logging.exception("pictures of an answer could not be read")
                what = f"pictures could not be read ({type(error).__name__})"
                self._done(job, Event(finish_reason="error", error=Defect(what, field="request")))
