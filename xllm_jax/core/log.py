"""What a run says: a progress bar, a JSONL file, TensorBoard events, and W&B where it is asked for.

Nothing is lost on resume.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, disk
from xllm_jax.core.errors import UserError
from xllm_jax.core.progress import Bar
from xllm_jax.core.text_lines import split_lines

LONGEST_ID = 128  # characters, as W&B has it


class Log:
    """Writes scalars of a run and shows its progress.

    `metrics.jsonl` holds one object a line (`step` and the scalars). When a run resumes at an
    earlier step than the file's last one, the lines past it are dropped: the file always shows one
    uninterrupted curve.

    Args:
      directory: the run's folder.
      name: shown in front of the bar.
      total: steps of the whole run.
      start: step the run starts or resumes from.
      main: whether this host writes at all.
      wandb: project of Weights & Biases that the scalars also go to; '' = none.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        total: int,
        start: int,
        main: bool = True,
        wandb: str = "",
    ):
        self._main, self._start, self._began = main, start, time.monotonic()
        if not main:
            return
        disk.make_folder(directory)
        self._sinks: list[Events | WeightsAndBiases] = (
            [WeightsAndBiases(directory, name, wandb)] if wandb else []
        )
        self._file = directory / "metrics.jsonl"
        self._truncate(start)
        self._stream = atomic.opened(self._file)
        self._sinks.append(Events(directory / "tensorboard", start))
        self._bar = Bar(total=total, initial=start, desc=name, unit="step")

    def _truncate(self, start: int) -> None:
        if not self._file.exists():
            return
        with atomic.opened(self._file, "r") as file:
            kept = [line for line in split_lines(file.read()) if _step(line) <= start]
        atomic.write_text(self._file, "".join(line + "\n" for line in kept))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the scalars of a step and moves the bar there."""
        if not self._main:
            return
        with disk.writing(self._file):
            self._stream.write(json.dumps({"step": step, **scalars}) + "\n")
            self._stream.flush()
        for sink in self._sinks:
            sink.write(step, scalars)
        self._bar.set_postfix_str(
            " ".join(f"{k}={v:.4g}" for k, v in scalars.items() if k in _SHOWN),
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def log(self, words: str) -> None:
        """Prints a line above the bar; nothing for no words."""
        if self._main and words:
            self._bar.write(words, file=sys.stderr)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self._main:
            self._bar.close()
            self._stream.close()
            for sink in self._sinks:
                sink.close()


class Events:
    """A TensorBoard event file, written without TensorFlow, which the usual writers try to import.

    Args:
      directory: folder of the event files; every start of the run adds one.
      start: step the run starts or resumes from; TensorBoard drops what it has of later steps.
    """

    def __init__(self, directory: Path, start: int):
        # Not above: they load S3's client, which takes longer than the rest of this package.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        # Any: their classes exist at run time alone.
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        disk.make_folder(directory)
        name = f"events.out.tfevents.{time.time_ns()}.{os.uname().nodename}"
        self._file = directory / name
        with disk.writing(self._file):
            self._records = RecordWriter(atomic.opened(self._file, "xb"))
        log = self._events.SessionLog(status=self._events.SessionLog.START)
        self._add(self._events.Event(file_version="brain.Event:2"))
        self._add(self._events.Event(session_log=log, step=start + 1))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        with disk.writing(self._file):
            self._records.write(event.SerializeToString())
            self._records.flush()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of one step."""
        summary = self._summaries.Summary
        values = [summary.Value(tag=k, simple_value=v) for k, v in scalars.items()]
        self._add(self._events.Event(step=step, summary=summary(value=values)))

    def close(self) -> None:
        """Closes the file."""
        self._records.close()


class WeightsAndBiases:
    """Sends scalars to one run of a project; a resumed run continues it.

    Args:
      directory: the run's folder; the id that W&B knows the run by is kept there.
      name: shown there.
      project: it belongs to.

    Raises:
      UserError: the package is not installed.
    """

    def __init__(self, directory: Path, name: str, project: str):
        try:
            import wandb  # pyright: ignore[reportMissingImports]  optional
        except ImportError as error:
            raise UserError(
                "Weights & Biases is not installed",
                field="wandb",
                hint="pip install -e '.[wandb]', or leave the field empty",
            ) from error
        file = directory / "wandb_id"
        if not file.exists():
            atomic.write_text(file, uuid.uuid4().hex)
        with atomic.opened(file, "r") as kept:
            identity = kept.read(LONGEST_ID)
        # By itself it would also send what is printed, and the repository's remote and changes.
        kept_back = {"console": "off", "disable_git": True, "save_code": False}
        self._run = wandb.init(
            settings=kept_back,
            project=project,
            name=name,
            id=identity,
            resume="allow",
            dir=str(directory),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of one step."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Finishes the upload."""
        self._run.finish()


_SHOWN = ("loss", "accuracy", "samples_per_second", "mfu", "bad_records")


def _step(line: str) -> int:
    """Step of a JSONL line; a line cut off by a kill counts as past every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 1 << 62
