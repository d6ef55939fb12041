"""Requests become prompts, beside decoding: files are read by some threads and encoded by another.

A request without files never waits for others' files. Files are read in as many threads as the
data's settings say, at most; what they have read waits for the encoder, which takes as many files
as there are and encodes them in batches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import modalities
from xllm_jax.data.text import templates
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference.assistant import open_prompt
from xllm_jax.inference.file_encoder import FileEncoder, Read, files_of
from xllm_jax.inference.media_cache import Encoded
from xllm_jax.serve.entry import Plan, key_of, pack_entry
from xllm_jax.serve.job import Job
from xllm_jax.serve.request import Defect

Done = Callable[[Job, UserError | None], None]


class Preparation:
    """Threads that prepare requests.

    Args:
      encoder: of files.
      family: of the LLM.
      plan: shapes of the prompts.
      keys: whether prompts are remembered by keys.
      done: is called with every job, and with what is wrong with it.
    """

    def __init__(self, encoder: FileEncoder, family: LLMFamily, plan: Plan, keys: bool, done: Done):
        self._encoder, self._family, self._plan, self._done = encoder, family, plan, done
        self._keys = keys
        self._data = encoder.data
        self._style = templates.template_of(self._data.template, family)
        threads = max(self._data.threads, 1)
        self._words = ThreadPoolExecutor(1, "prompts")
        self._readers = ThreadPoolExecutor(threads, "readers")
        # Bounded: what has been read of a video takes far more memory than its file.
        self._read: queue.Queue[Job | None] = queue.Queue(2 * threads)
        self._thread = threading.Thread(target=self._encode_all, name="encoder", daemon=True)
        self._thread.start()

    def put(self, job: Job) -> None:
        """Takes a request; returns at once."""
        if files_of(job.ticket.request.example):
            self._readers.submit(self._guarded, self._find, [job])
        else:
            self._words.submit(self._guarded, self._write, [job])

    def close(self) -> None:
        """Ends all threads when they have done what they were given."""
        self._words.shutdown()
        self._readers.shutdown()
        self._read.put(None)
        self._thread.join()

    def _guarded(self, work: Callable[[Sequence[Job]], None], jobs: Sequence[Job]) -> None:
        """Works on jobs; what is raised ends the one that it is about."""
        jobs = [job for job in jobs if not job.over]
        try:
            work(jobs)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._guarded(work, [job])
            elif isinstance(error, UserError):
                self._done(jobs[0], error)
            else:
                logging.exception("a request could not be prepared")
                what = f"could not be prepared ({type(error).__name__})"
                self._done(jobs[0], Defect(what, field="request"))

    def _find(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            example = modalities.rename_cif_media(job.ticket.request.example, self._data)
            for medium in files_of(example):
                if medium not in job.files and not job.over:
                    job.files[medium] = self._encoder.find(*medium, self._encoder.key(*medium))
            self._read.put(job)

    def _encode_all(self) -> None:
        while (job := self._read.get()) is not None:
            jobs = [job]
            while len(jobs) < self._plan.slots and not self._read.empty():
                other = self._read.get()
                if other is None:
                    self._read.put(None)
                    break
                jobs.append(other)
            self._guarded(self._encode, jobs)
            for one in jobs:
                self._guarded(self._write, [one])

    def _encode(self, jobs: Sequence[Job]) -> None:
        read = [one for job in jobs for one in job.files.values() if isinstance(one, Read)]
        made = self._encoder.encode(read)
        for job in jobs:
            for medium, one in job.files.items():
                if isinstance(one, Read):
                    job.files[medium] = made[one.key]

    def _write(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            request = job.ticket.request
            example = modalities.rename_cif_media(request.example, self._data)
            files = {name: one for name, one in job.files.items() if isinstance(one, Encoded)}
            length = self._plan.length
            made = open_prompt(example, files, self._family, self._style, length)
            job.prompt_tokens = len(made.ids)
            job.entry = pack_entry(made, files, request.sampling, self._plan)
            job.key = key_of(job.entry) if self._keys else ""
            job.files = {}
            self._done(job, None)
