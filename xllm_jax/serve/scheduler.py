"""The engine: requests share one running batch, and none of them notices the others.

One thread owns the batch. In each round it lets requests into free slots, decodes one token for all
rows, and, while the device is at work, hands out the tokens of the round before. A request whose
client has gone leaves at the next round.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
from absl import logging

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import modalities
from xllm_jax.data.media.decode_workers import Decoders
from xllm_jax.data.text import llm_family
from xllm_jax.inference.file_encoder import FileEncoder, files_of
from xllm_jax.inference.load_run import Restored
from xllm_jax.inference.row_sampling import Chosen
from xllm_jax.models.xllm import LLM
from xllm_jax.serve.compilations import Compilations
from xllm_jax.serve.entry import Plan
from xllm_jax.serve.job import Job
from xllm_jax.serve.picture_reader import PictureReader
from xllm_jax.serve.pieces import Pieces
from xllm_jax.serve.preparation import Preparation
from xllm_jax.serve.request import (
    Defect,
    Event,
    Overloaded,
    QueueFull,
    Refused,
    Request,
    Ticket,
    TimedOut,
)
from xllm_jax.serve.slots import Slots
from xllm_jax.serve.text_stream import TextStream

FAILURES = 3  # rounds in a row that may fail before the engine gives up


@dataclasses.dataclass(frozen=True)
class Options:
    """Sizes and bounds of an engine.

    Attributes:
      slots: requests that are decoded at a time.
      length: tokens of a prompt, media included, at most.
      max_tokens: tokens of an answer at most, whatever a request asks for.
      queue: requests that may wait for a slot, those whose files are being encoded included.
      queue_seconds: that a request may wait for a slot.
      request_seconds: that a request may take in all.
      cache_bytes: of encoded files that are remembered.
      context_bytes: of prompts that are remembered on the device when they have been read.
    """

    slots: int = 8
    length: int = 512
    max_tokens: int = 256
    queue: int = 64
    queue_seconds: float = 60.0
    request_seconds: float = 300.0
    cache_bytes: int = 2**30
    context_bytes: int = 2**29


class Scheduler:
    """Answers requests with one model; an `Engine` of `serve/request.py`.

    Args:
      restored: networks and parameters.
      options: sizes and bounds.
      load: opens a file; by default in worker processes that can be killed.
    """

    def __init__(
        self,
        restored: Restored,
        options: Options = Options(),
        load: modalities.Load | None = None,
    ):
        data, model = restored.stage.data, restored.model
        self.options, self.data, self.model = options, data, model
        self.family = llm_family.load(data)
        self.plan = Plan(
            slots=options.slots,
            length=options.length,
            max_tokens=options.max_tokens,
            ends=self.family.ends,
            position_step=self.family.position_step,
            width=model.networks[LLM].width,
            signals=tuple((one.first, one.count, one.between) for one in data.signals.values()),
        )
        self._decoders = Decoders(data) if load is None else None
        load = self._decoders.load if self._decoders else load or modalities.load
        self._encoder = FileEncoder(restored, options.slots, options.cache_bytes, load)
        self._slots = Slots(model, restored.params, self.plan, options.context_bytes)
        told = (model, restored.params, data.signals, self.family, self.plan, self._completed)
        self._pictures = PictureReader(*told) if model.outputs else None
        self._pieces = Pieces(self.family)
        self._counts: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self._changed = threading.Condition()
        self._waiting: dict[Job, None] = {}  # without a slot, in the order in which they came
        self._prepared: collections.deque[Job] = collections.deque()
        self._rows: dict[int, Job] = {}
        self._completing: dict[Job, None] = {}  # have answered, and pictures are being read
        self._untold: collections.deque[tuple[Chosen, dict[int, Job]]] = collections.deque()
        self._state = "new"  # then 'ready', 'stopping', 'ended'
        self._drained_by = float("inf")
        self._failures = 0

    @property
    def ready(self) -> bool:
        """Whether it is warmed up and takes requests."""
        return self._state == "ready"

    def start(self) -> None:
        """Compiles all that will run, then takes requests."""
        self._encoder.warm_up()
        self._slots.warm_up(self.family)
        if self._pictures:
            self._pictures.warm_up()
        keys = self.options.context_bytes > 0
        self._preparation = Preparation(self._encoder, self.family, self.plan, keys, self._done)
        self._compilations = Compilations()
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._state = "ready"
        self._thread.start()

    def submit(self, request: Request) -> Ticket:
        """Queues a request; see `Engine.submit`."""
        for modality, _ in files_of(modalities.rename_cif_media(request.example, self.data)):
            self.model.parts(modality)
        most = min(request.sampling.max_tokens or self.plan.max_tokens, self.plan.max_tokens)
        ticket = Ticket(request, self._wake)
        stream = TextStream(self.family, self.data.signals, request.sampling.stop)
        job = Job(ticket, stream, most)
        with self._changed:
            self._counts["requests_total"] += 1
            if not self.ready:
                self._counts["requests_refused_total"] += 1
                raise Overloaded(f"is {self._state}", field="engine", hint="Try again later")
            if len(self._waiting) >= self.options.queue:
                self._counts["requests_refused_total"] += 1
                what = f"{len(self._waiting)} requests wait already"
                raise QueueFull(what, field="engine", hint="Try again later")
            self._waiting[job] = None
        self._preparation.put(job)
        return ticket

    def stop(self, drain_seconds: float = 30.0) -> None:
        """Lets what runs finish, for a while, then ends; see `Engine.stop`."""
        with self._changed:
            if self._state == "new":
                self._state = "ended"
            if self._state == "ended":
                return
            self._state = "stopping"
            self._drained_by = min(self._drained_by, time.monotonic() + drain_seconds)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._state == "ended")

    def metrics(self) -> Mapping[str, float]:
        """Numbers now; see `Engine.metrics`."""
        cache, contexts = self._encoder.cache, self._slots.contexts
        compiled = self._compilations.count if self._state != "new" else 0
        return self._counts | {
            "queue_length": float(len(self._waiting)),
            "slots": float(self.plan.slots),
            "slots_busy": float(len(self._rows)),
            "decoder_cache_bytes": float(self._slots.cache_bytes),
            "compilations_since_warm_up_total": float(compiled),
            "media_cache_bytes": float(cache.bytes),
            "media_cache_hits_total": float(cache.hits),
            "media_cache_misses_total": float(cache.misses),
            "context_cache_bytes": float(contexts.bytes),
            "context_cache_hits_total": float(contexts.hits),
            "context_cache_misses_total": float(contexts.misses),
        }

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _done(self, job: Job, error: UserError | None) -> None:
        """Takes a job back from the preparation."""
        with self._changed:
            if error is not None:
                self._end(job, Event(finish_reason="error", error=error))
            elif not job.over:
                self._prepared.append(job)
            self._changed.notify_all()

    def _completed(self, job: Job, event: Event) -> None:
        """Takes a job back whose pictures have been read."""
        with self._changed:
            if not job.over:
                self._counts["pictures_read_total"] += len(event.pictures)
            self._end(job, event)
            self._changed.notify_all()

    def _end(self, job: Job, event: Event) -> None:
        """Ends a job, wherever it is; one that is over stays as it ended."""
        with self._changed:
            if job.over:
                return
            self._waiting.pop(job, None)
            self._completing.pop(job, None)
            self._prepared = collections.deque(one for one in self._prepared if one is not job)
            self._rows = {slot: one for slot, one in self._rows.items() if one is not job}
            kind = {"cancelled": "requests_cancelled_total", "error": "requests_failed_total"}
            self._counts[kind.get(event.finish_reason or "", "requests_answered_total")] += 1
            self._counts["request_seconds_total"] += time.monotonic() - job.submitted
            job.end(event)

    def _run(self) -> None:
        """The life of the decoding thread."""
        try:
            while self._next_round():
                try:
                    self._round()
                    self._failures = 0
                except Exception as error:
                    logging.exception("a round of decoding failed")
                    if not self._recovered(error):
                        break
        finally:
            self._close()

    def _next_round(self) -> bool:
        """Waits until there is something to do; False when there never will be."""
        with self._changed:
            while True:
                self._reap()
                room = len(self._completing) < self.plan.slots
                if self._rows or self._untold or (self._prepared and room):
                    return True
                if self._state == "stopping" and not (self._waiting or self._completing):
                    return False
                self._changed.wait(self._patience())

    def _patience(self) -> float | None:
        """Seconds until a waiting request is too late, or the time to drain is up."""
        now, options = time.monotonic(), self.options
        allowed = min(options.queue_seconds, options.request_seconds)
        due = [job.submitted + allowed for job in self._waiting]
        due += [job.submitted + options.request_seconds for job in self._completing]
        due += [self._drained_by] if self._state == "stopping" else []
        return max(min(due) - now, 0.0) + 0.001 if due else None

    def _reap(self) -> None:
        """Ends whose client has gone, and who has waited or run for too long."""
        now = time.monotonic()
        late = self._state == "stopping" and now >= self._drained_by
        for job in (*self._waiting, *self._rows.values(), *self._completing):
            age, options = now - job.submitted, self.options
            if job.ticket.cancelled or late:
                self._end(job, Event(finish_reason="cancelled"))
            elif not job.entered and age > options.queue_seconds:
                self._end(job, _late(f"waited {options.queue_seconds:g} s for a slot"))
            elif age > options.request_seconds:
                self._end(job, _late(f"took longer than {options.request_seconds:g} s"))

    def _round(self) -> None:
        """Lets requests in, decodes one token of each row, and tells those of the round before."""
        for slot, job in self._admitted():
            assert job.entry is not None, "prepared"
            self._untold.append((self._slots.enter(slot, job.entry, job.key), {0: job}))
            job.prompt, job.entry = job.entry if self._pictures else None, None
        rows = self._rows
        if rows:
            kept = np.isin(np.arange(self.plan.slots), list(rows))
            self._untold.append((self._slots.step(kept), rows))
            self._counts["steps_total"] += 1
        while len(self._untold) > bool(rows):
            self._tell(*self._untold.popleft())

    def _admitted(self) -> list[tuple[int, Job]]:
        """Prepared requests and their slots."""
        entering = []
        with self._changed:
            # Pictures that are to be read hold their prompts: they count as slots.
            most = self.plan.slots - len(self._completing)
            free = [slot for slot in range(self.plan.slots) if slot not in self._rows]
            free = free[: max(most - len(self._rows), 0)]
            while free and self._prepared:
                job = self._prepared.popleft()
                if job.over:
                    continue
                del self._waiting[job]
                job.entered = time.monotonic()
                self._counts["queue_seconds_total"] += job.entered - job.submitted
                self._counts["prompt_tokens_total"] += job.prompt_tokens
                entering.append((free.pop(0), job))
            self._rows = self._rows | dict(entering)
        return entering

    def _tell(self, chosen: Chosen, rows: Mapping[int, Job]) -> None:
        """Hands the tokens of some rows out."""
        tokens, logprobs = jax.device_get((chosen.tokens, chosen.logprobs))
        told = any(job.ticket.request.sampling.logprobs for job in rows.values())
        top = jax.device_get((chosen.top_tokens, chosen.top_logprobs)) if told else ()
        for row, job in rows.items():
            if job.over or job in self._completing:  # a step that was under way
                continue
            job.tokens += 1
            self._counts["completion_tokens_total"] += 1
            best = tuple(x[row] for x in top)
            event = self._event(job, int(tokens[row]), float(logprobs[row]), best)
            if event.finish_reason is None:
                job.ticket.put(event)
            elif self._pictures and self._pictures.asked(job.answer):
                self._complete(job, event)
            else:
                self._end(job, event)

    def _complete(self, job: Job, event: Event) -> None:
        """Gives a slot back, and has the pictures of its answer read before the last event."""
        assert self._pictures
        with self._changed:
            self._rows = {slot: one for slot, one in self._rows.items() if one is not job}
            self._completing[job] = None
        if event.text or event.tokens:
            job.ticket.put(dataclasses.replace(event, finish_reason=None))
        self._pictures.put(job, event)

    def _event(self, job: Job, token: int, logprob: float, top: tuple[np.ndarray, ...]) -> Event:
        if token in self.family.ends:
            return Event(job.stream.close(), finish_reason="stop")
        count = job.ticket.request.sampling.logprobs
        job.answer.append(token)
        told = self._pieces.token(token, logprob, top, count)
        text = job.stream.push(token)
        if job.stream.stopped:
            return Event(text, (told,), "stop")
        if job.tokens < job.most:
            return Event(text, (told,))
        text += job.stream.close()
        return Event(text, (told,), "stop" if job.stream.stopped else "length")

    def _recovered(self, error: Exception) -> bool:
        """Ends what ran when a round failed, and begins with empty slots, if it can."""
        self._failures += 1
        self._untold.clear()
        what = f"decoding failed ({type(error).__name__})"
        for job in list(self._rows.values()):
            self._end(job, Event(finish_reason="error", error=Defect(what, field="engine")))
        try:
            self._slots.contexts.clear()
            self._slots.reset()
        except Exception:
            logging.exception("the slots could not be made again")
            return False
        return self._failures < FAILURES

    def _close(self) -> None:
        """Ends all threads and workers, and whoever still waits."""
        with self._changed:
            self._state = "stopping"
            for job in (*self._waiting, *self._rows.values(), *self._completing):
                error = Overloaded("has stopped", field="engine", hint="Try again later")
                self._end(job, Event(finish_reason="error", error=error))
        self._preparation.close()
        if self._pictures:
            self._pictures.close()
        if self._decoders:
            self._decoders.close()
        self._compilations.close()
        with self._changed:
            self._state = "ended"
            self._changed.notify_all()


COUNTERS = (
    "requests_total",
    "requests_answered_total",
    "requests_failed_total",
    "requests_cancelled_total",
    "requests_refused_total",
    "queue_seconds_total",
    "request_seconds_total",
    "steps_total",
    "prompt_tokens_total",
    "completion_tokens_total",
    "pictures_read_total",
)


def _late(what: str) -> Event:
    error: Refused = TimedOut(what, field="request", hint="Try again later")
    return Event(finish_reason="error", error=error)
