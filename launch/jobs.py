"""Jobs: commands of `xllm` that run beside each other, each on its own cores, with a log file."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from xllm_jax.core import atomic, disk
from xllm_jax.core.progress import Bar
from xllm_jax.core.text_lines import split_lines
from xllm_jax.launch import cli, commands


@dataclasses.dataclass
class Job:
    """One command and the jobs whose results it reads; a training writes to runs/NAME."""

    name: str
    command: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()


class Running:
    """A job under way on its own cores, with its log file."""

    def __init__(self, job: Job, folder: Path, cores: set[int]):
        self.job, self.cores, self.began = job, cores, time.monotonic()
        self.computed = 0.0
        self.log = folder / "logs" / f"{job.name}.log"
        disk.make_folder(self.log.parent)
        # The same as `xllm`, which need not be on the PATH.
        xllm = (sys.executable, "-m", commands.__name__)
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str((folder / "cache").absolute()),
            # A fifth off the compile time of these small networks; their steps are no slower.
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=1"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        }
        self.process = subprocess.Popen(
            [*xllm, job.command, *job.arguments],
            cwd=folder,
            env=environment,
            stdout=atomic.opened(self.log, "w"),
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def ended(self) -> bool:
        """Whether the process has ended; `computed` is then its user and system seconds."""
        before = computed()
        code = self.process.poll()
        self.computed += computed() - before  # of a child that was waited for just now
        return code is not None

    def progress(self, folder: Path) -> str:
        """Where the job is, from the last line of its metrics."""
        file = folder / "runs" / self.job.name / "metrics.jsonl"
        try:
            last = json.loads(split_lines(file.read_text())[-1])
            return f"{self.job.name} step {last['step']} loss {last['loss']:.3f}"
        except (OSError, IndexError, ValueError, KeyError):
            return f"{self.job.name} {time.monotonic() - self.began:.0f} s"


def computed() -> float:
    """User and system seconds of all children that have ended and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_all(todo: list[Job], folder: Path, slots: int = 0, name: str = "demo") -> dict[str, float]:
    """Runs the jobs as their needs allow; returns {name: seconds}.

    Args:
      todo: the jobs; their needs are among them.
      folder: in which they run.
      slots: how many run at a time; 0 is one for each core, two at most.
      name: what the bar calls it.

    Raises:
      SystemExit: a job failed or SIGTERM came; the jobs under way are stopped.
    """
    running: list[Running] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _run_all(todo, running, folder, slots, name)
    finally:
        for active in running:
            active.process.terminate()
        for active in running:
            active.process.wait()


def _run_all(
    todo: list[Job], running: list[Running], folder: Path, slots: int, name: str
) -> dict[str, float]:
    cores = sorted(os.sched_getaffinity(0))
    slots = slots or min(2, len(cores))
    waiting, seconds = list(todo), {}
    bar = Bar(total=len(todo), desc=name, unit="step")
    while waiting or running:
        for job in [j for j in waiting if all(need in seconds for need in j.needs)]:
            share = pick_cores(cores, running, slots)
            if share:
                waiting.remove(job)
                if bar.in_terminal:
                    bar.write(f"$ {typed(job, folder)}")
                running.append(Running(job, folder, share))
        time.sleep(0.2)
        for active in [r for r in running if r.ended()]:
            running.remove(active)
            if active.process.returncode:
                fail(active)
            seconds[active.job.name] = time.monotonic() - active.began
            atomic.write_json(folder / "timings.json", seconds)
            how = "" if bar.in_terminal else f": {typed(active.job, folder)}"
            took = f"{seconds[active.job.name]:.0f} s, {active.computed:.0f} s of a core"
            bar.write(f"  {active.job.name} done in {took}{how}")
            bar.update()
        bar.set_postfix_str(" | ".join(r.progress(folder) for r in running))
    bar.close()
    return seconds


def typed(job: Job, folder: Path) -> str:
    """The command as a user would type it, in the folder that its paths start from."""
    command = shlex.join(["xllm", job.command, *job.arguments])
    place = os.path.relpath(folder)
    return command if place == os.curdir else f"cd {shlex.quote(place)} && {command}"


def pick_cores(cores: list[int], running: list[Running], slots: int) -> set[int]:
    """Free cores for a job, its share of them; none where all slots are taken."""
    if len(running) >= slots:
        return set()
    taken = {core for active in running for core in active.cores}
    free = [core for core in cores if core not in taken]
    return set(free[: max(1, len(cores) // slots)])


def fail(failed: Running) -> NoReturn:
    """Leaves, showing why a job failed: by its line and exit code, or the end of its log."""
    code, lines = failed.process.returncode, split_lines(failed.log.read_text(errors="replace"))
    said = f"{failed.job.name} failed (whole log: {failed.log}):"
    if code in (cli.FAILED, cli.DIVERGED, cli.UNWRITABLE):
        last = lines[-1].split("\r")[-1] if lines else f"exit code {code}"
        cli.fail(f"{said} {last}", code)
    raise SystemExit("\n".join([said, *lines[-15:]]))
