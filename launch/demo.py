"""Runs X-LLM end to end in miniature: builds the world, trains all stages, evaluates.

    xllm demo --output=demo [--quick]

Every step is a command that a user could type; it is printed, and what it says goes to
`demo/logs/NAME.log`. Two steps run at a time, one core each, wherever they do not need each other:
on few cores that is almost twice as fast as giving both cores to one small model. A second call
continues where the first one stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from absl import flags

from xllm_jax.configs import networks
from xllm_jax.core import atomic, disk
from xllm_jax.core.progress import Bar
from xllm_jax.core.text_lines import split_lines
from xllm_jax.launch import cli, commands

OUTPUT = flags.DEFINE_string(
    "output", "demo", "Folder in which the world, the runs and the report are written."
)
QUICK = flags.DEFINE_bool(
    "quick", False, "Run everything in about three minutes, at lower quality."
)
SLOTS = flags.DEFINE_integer(
    "slots", 0, "Number of steps that run at a time; 0 runs one for each core, two at most."
)

# Optimizer updates of each stage when --quick cuts them.
QUICK_STEPS = {
    "stage1_speech": 30,
    "stage1_image": 15,
    "stage2_image": 40,
    "stage2_image_no_init": 40,
    "stage2_video": 20,
    "stage2_speech": 30,
    "stage3": 10,
}


@dataclasses.dataclass
class Job:
    """One command of the demo and the jobs whose results it reads."""

    name: str
    command: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()
    alone: bool = False


def stage(name: str, config: str, needs: tuple[str, ...], *more: str) -> Job:
    """The job that trains one stage with its tiny configuration."""
    # Few steps do not repay the longer compilation of unrolled layers, nor that of a second bucket,
    # nor that of measuring held-out data.
    quick: tuple[str, ...] = ()
    if QUICK.value:
        quick = (f"--config.steps={QUICK_STEPS[name]}", "--config.unroll=1")
        quick += ("--config.validation.every=0",)
    if QUICK.value and name in ("stage1_speech", "stage2_speech"):
        quick += (f"--config.data.frames=({networks.TINY_FRAMES[-1]},)",)
    arguments = (f"--config={config}:tiny", f"--workdir=runs/{name}", *more, *quick)
    return Job(name, "train", arguments, needs)


def jobs() -> list[Job]:
    """All steps; earlier ones are started first."""
    size = ("--quick",) if QUICK.value else ()
    limit = ("--limit=24",) if QUICK.value else ()
    start = ("world", "bases")
    return [
        Job("world", "world", ("--output=world", *size)),
        Job("bases", "build-backbones", ("--output=bases",)),
        stage("stage1_image", "stage1_image", start),
        stage("stage1_speech", "stage1_speech", start),
        stage("stage2_image", "stage2_image", ("stage1_image",)),
        stage("stage2_speech", "stage2_speech", ("stage1_speech",)),
        stage("stage2_video", "stage2_video", ("stage2_image",)),
        # The same number of steps from a fresh interface: Table 1's "no init".
        stage("stage2_image_no_init", "stage2_image", start, "--config.init.image_interface="),
        stage("stage3", "stage3_instruction", ("stage2_image", "stage2_video", "stage2_speech")),
        Job(
            "evaluate",
            "evaluate",
            ("--runs=runs", "--data=world", "--output=.", *limit),
            ("stage3", "stage2_image_no_init"),
            alone=True,
        ),
    ]


class Running:
    """A job under way on its own cores, with its log file."""

    def __init__(self, job: Job, folder: Path, cores: set[int]):
        self.job, self.cores, self.began = job, cores, time.monotonic()
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
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )

    def progress(self, folder: Path) -> str:
        """Where the job is, from the last line of its metrics."""
        file = folder / "runs" / self.job.name / "metrics.jsonl"
        try:
            last = json.loads(split_lines(file.read_text())[-1])
            return f"{self.job.name} step {last['step']} loss {last['loss']:.3f}"
        except (OSError, IndexError, ValueError, KeyError):
            return f"{self.job.name} {time.monotonic() - self.began:.0f} s"


def run_all(todo: list[Job], folder: Path) -> dict[str, float]:
    """Runs the jobs as their needs allow; returns {name: seconds}.

    Raises:
      SystemExit: a job failed or SIGTERM came; the jobs under way are stopped.
    """
    running: list[Running] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _run_all(todo, running, folder)
    finally:
        for active in running:
            active.process.terminate()
        for active in running:
            active.process.wait()


def _run_all(todo: list[Job], running: list[Running], folder: Path) -> dict[str, float]:
    cores = sorted(os.sched_getaffinity(0))
    slots = SLOTS.value or min(2, len(cores))
    waiting, seconds = list(todo), {}
    bar = Bar(total=len(todo), desc="demo", unit="step")
    while waiting or running:
        for job in [j for j in waiting if all(need in seconds for need in j.needs)]:
            share = pick_cores(cores, running, slots, job)
            if share:
                waiting.remove(job)
                if bar.in_terminal:
                    bar.write(f"$ {typed(job)}")
                running.append(Running(job, folder, share))
        time.sleep(0.2)
        for active in [r for r in running if r.process.poll() is not None]:
            running.remove(active)
            if active.process.returncode:
                fail(active)
            seconds[active.job.name] = time.monotonic() - active.began
            atomic.write_json(folder / "timings.json", seconds)
            how = "" if bar.in_terminal else f": {typed(active.job)}"
            bar.write(f"  {active.job.name} done in {seconds[active.job.name]:.0f} s{how}")
            bar.update()
        bar.set_postfix_str(" | ".join(r.progress(folder) for r in running))
    bar.close()
    return seconds


def typed(job: Job) -> str:
    """The command as a user would type it."""
    return shlex.join(["xllm", job.command, *job.arguments])


def pick_cores(cores: list[int], running: list[Running], slots: int, job: Job) -> set[int]:
    """Free cores for a job: its share of them, or all for a job that runs alone."""
    if len(running) >= slots or (job.alone and running):
        return set()
    if job.alone:
        return set(cores)
    taken = {core for active in running for core in active.cores}
    share = [core for core in cores if core not in taken][: max(1, len(cores) // slots)]
    return set(share)


def fail(failed: Running) -> NoReturn:
    """Leaves, showing why a job failed: by its line and exit code, or the end of its log."""
    code, lines = failed.process.returncode, split_lines(failed.log.read_text(errors="replace"))
    said = f"{failed.job.name} failed (whole log: {failed.log}):"
    if code in (cli.FAILED, cli.DIVERGED, cli.UNWRITABLE):
        last = lines[-1].split("\r")[-1] if lines else f"exit code {code}"
        cli.fail(f"{said} {last}", code)
    raise SystemExit("\n".join([said, *lines[-15:]]))


def main(_: list[str]) -> None:
    began = time.monotonic()
    folder = Path(OUTPUT.value).absolute()
    disk.make_folder(folder)
    seconds = run_all(jobs(), folder)
    seconds["whole run"] = time.monotonic() - began
    print((folder / "report.txt").read_text("utf-8"))
    for name, value in seconds.items():
        print(f"{name:24s} {value:7.0f} s")
    print(f"\nThe report with pictures: {Path(OUTPUT.value) / 'report.html'}")


if __name__ == "__main__":
    cli.run(main, "Finished steps are kept, and the same command continues")
