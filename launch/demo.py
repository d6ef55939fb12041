"""Runs X-LLM end to end in miniature: builds the world, trains all stages, evaluates.

    xllm demo --output=demo [--quick] [--seed=1] [--seeds=3]

Every step is a command that a user could type; it is printed, and what it says goes to
`demo/logs/NAME.log`. Two steps run at a time, one core each, wherever they do not need each other:
on few cores that is almost twice as fast as giving both cores to one small model. A second call
continues where the first one stopped.

World and backbones are the same for every seed, so that runs differ by their trainings alone. Seed
0 lies in the output folder itself, another one in `seed-N` below. Several seeds give a table over
runs, too.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from absl import flags

from xllm_jax.configs import networks, stage2_image
from xllm_jax.core import atomic, disk
from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli
from xllm_jax.launch.jobs import Job, computed, run_all
from xllm_jax.report import spread

OUTPUT = flags.DEFINE_string(
    "output", "demo", "Folder in which the world, the runs and the report are written."
)
QUICK = flags.DEFINE_bool(
    "quick", False, "Run everything in three to four minutes, at lower quality."
)
SLOTS = flags.DEFINE_integer(
    "slots", 0, "Number of steps that run at a time; 0 runs one for each core, two at most.", 0
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of all trainings; the world and its test split stay as they are.", 0
)
SEEDS = flags.DEFINE_integer(
    "seeds", 1, "Number of seeds that run one after another, from --seed on.", 1
)

SHARED = ("world", "bases", "cache")  # folders that all seeds have in common
# Optimizer updates of each stage when --quick cuts them.
QUICK_STEPS = {
    "stage1_speech": 12,
    "stage1_image": 15,
    "stage2_image": 40,
    "stage2_image_no_init": 20,
    "stage2_image_half": 20,
    "stage2_video": 20,
    "stage2_speech": 15,
    "stage3": 10,
    "stage_output_image": 10,
}


def stage(name: str, config: str, seed: int, needs: tuple[str, ...], *more: str) -> Job:
    """The job that trains one stage with its tiny configuration.

    Args:
      name: of the job and its run.
      config: the stage.
      seed: of the training.
      needs: jobs before it.
      more: flags.
    """
    # Few steps do not repay the longer compilation of unrolled layers, nor that of a second bucket,
    # nor that of measuring held-out data.
    quick: tuple[str, ...] = ()
    if QUICK.value:
        quick = (f"--config.steps={QUICK_STEPS[name]}", "--config.unroll=1")
        quick += ("--config.validation.every=0",)
    if QUICK.value and name in ("stage1_speech", "stage2_speech"):
        quick += (f"--config.data.frames=({networks.TINY_FRAMES[-1]},)",)
    own = (f"--config.seed={seed}",) if seed else ()
    arguments = (f"--config={config}:tiny", f"--workdir=runs/{name}", *own, *more, *quick)
    return Job(name, "train", arguments, needs)


def jobs(seed: int = 0) -> list[Job]:
    """All steps with one seed; earlier ones are started first."""
    size = ("--quick",) if QUICK.value else ()
    limit = ("--limit=24",) if QUICK.value else ()
    start, fresh = ("world", "bases"), "--config.init.image_interface="
    sources = ("captions", "regions", "questions")
    half = [f"--config.data.sources.{name}.share=0.5" for name in sources]
    half.append(f"--config.steps={stage2_image.get_config('tiny').steps // 2}")
    up = "../" if seed else ""
    stage2 = ("stage2_image", "stage2_video", "stage2_speech")
    report = ("--runs=runs", "--data=world", "--output=.", *limit)
    drawn = ("stage3", "stage_output_image")
    others = ("stage1_image", "stage2_image_no_init", "stage2_image_half")
    return [
        Job("world", "world", (f"--output={up}world", *size)),
        Job("bases", "build-backbones", (f"--output={up}bases",)),
        stage("stage1_speech", "stage1_speech", seed, start),
        # Begins with the shipped BLIP-2, as the paper does; stage 1 of images is for those who
        # have none, and is measured by itself.
        stage("stage2_image", "stage2_image", seed, start),
        stage("stage2_speech", "stage2_speech", seed, ("stage1_speech",)),
        stage("stage2_video", "stage2_video", seed, ("stage2_image",)),
        stage("stage3", "stage3_instruction", seed, stage2),
        # Long ones first, so that no core waits for the last of them.
        stage("stage1_image", "stage1_image", seed, start),
        # What the frozen LLM's signal tokens stand for: text alone, beside the frozen decoder.
        stage("stage_output_image", "stage_output_image", seed, start),
        # As many passes over half of the pairs: Table 1's "w/ 4M" at the paper's fixed epochs.
        stage("stage2_image_half", "stage2_image", seed, start, *half),
        # The same pairs and steps from a fresh interface: Table 1's "no init". With all of them it
        # has learned this small world from nothing before they end.
        stage("stage2_image_no_init", "stage2_image", seed, start, *half, fresh),
        # Two at a time: what they measure is kept, and the report made of both.
        Job("drawings", "evaluate", (*report, "--only=drawings"), drawn),
        Job("answers", "evaluate", (*report, "--only=answers"), (*drawn, *others)),
        Job("evaluate", "evaluate", report, ("drawings", "answers")),
    ]


def run_seed(output: Path, seed: int) -> Path:
    """Runs all steps with one seed, prints the report and the times; returns the seed's folder.

    Args:
      output: folder of the demo.
      seed: of the trainings.
    """
    began = time.monotonic()
    folder = output / f"seed-{seed}" if seed else output
    for name in SHARED if seed else ():
        disk.make_folder(folder)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..") / name, target_is_directory=True)
    disk.make_folder(output / "cache")
    before = computed()
    seconds = run_all(jobs(seed), folder, SLOTS.value)
    seconds["whole run"] = time.monotonic() - began
    seconds["of a core (user + system)"] = computed() - before
    print((folder / "report.txt").read_text("utf-8"))
    for name, value in seconds.items():
        print(f"{name:26s} {value:7.0f} s")
    print(f"\nThe report with pictures: {os.path.relpath(folder / 'report.html')}")
    return folder


def main(_: list[str]) -> None:
    if not OUTPUT.value:
        raise UserError("names no folder", field="--output")
    output = Path(OUTPUT.value).absolute()
    disk.make_folder(output)
    seeds = range(SEED.value, SEED.value + SEEDS.value)
    made = {seed: spread.values(run_seed(output, seed)) for seed in seeds}
    if len(made) > 1:
        shown = spread.text(made)
        atomic.write_text(output / "seeds.txt", shown + "\n")
        print(f"\n{shown}")
    elif not QUICK.value:
        print(spread.place(made[SEED.value], spread.recorded()))


if __name__ == "__main__":
    cli.run(main, "Finished steps are kept, and the same command continues")
