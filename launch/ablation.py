"""Compares ways to tune after a demo: adapters alone, LoRA, DoRA, on int8 and nf4 bases.

    xllm ablation --output=demo [--seeds=3] [--only=adapters,lora] [--steps=220] [--limit=100]

Trains stage 3 of the miniature in each way, with as many steps and from the same stage-2 runs of
`--output`, a folder of `xllm demo`. Each answers held-out questions about pictures and spoken ones;
runs without LoRA also answer with the LLM's base packed in 8 and 4 bits, untrained and trained.
Writes ablation/ablation.json and .txt below the folder, and prints the table. What is finished is
kept: the same command continues, and more seeds add to those that are there. Other --steps, or
another LLM in the demo, need the folder ablation/ anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from xllm_jax.assembly import adapter_source
from xllm_jax.configs import stage3_instruction
from xllm_jax.core import (
    atomic,
    base_description,
    bounded,
    checkpoint,
    checksum,
    disk,
    fingerprint,
    kernel_fingerprint,
)
from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import ablation, answer_store, demo_suite, measure
from xllm_jax.inference import assistant, load_run
from xllm_jax.launch import cli
from xllm_jax.launch.jobs import Job, run_all
from xllm_jax.report import ablation as page
from xllm_jax.report import text

OUTPUT = flags.DEFINE_string("output", "demo", "Folder of a demo that has run.")
SEEDS = flags.DEFINE_integer("seeds", 1, "Number of seeds of each training.", 1)
STEPS = flags.DEFINE_integer("steps", 0, "Updates of each training; 0 are those of the demo.", 0)
LIMIT = flags.DEFINE_integer("limit", 0, "Most samples of a task; 0 takes a few hundred.", 0)
ONLY = flags.DEFINE_list("only", [], "Ways to tune; all by default. 'adapters' is always among.")
SLOTS = flags.DEFINE_integer(
    "slots", 0, "Number of trainings at a time; 0 runs one for each core, two at most.", 0
)

LLM, ROWS = "llm", 32
PACKED = ("int8", "nf4")
SHARED = ("world", "bases", "cache")
STAGE2 = ("stage1_speech", "stage2_image", "stage2_video", "stage2_speech")
STAGE3 = "stage3"
LORA = ("--config.lora.rank=16", "--config.lora.targets=llm/layers/.*")


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to tune: its title, how the LLM's base is packed, and flags of its training."""

    title: str
    weights: str = ""
    flags: tuple[str, ...] = ()


WAYS = {
    "adapters": Way("the interfaces' adapters (paper)"),
    "lora": Way("and LoRA of rank 16 on the LLM", flags=LORA),
    "dora": Way("and DoRA of rank 16 on the LLM", flags=(*LORA, "--config.lora.dora=True")),
    "int8": Way("adapters, on an int8 base", "int8"),
    "nf4": Way("adapters, on an nf4 base", "nf4"),
    "lora_nf4": Way("and LoRA, on an nf4 base (QLoRA)", "nf4", LORA),
}


def base(weights: str) -> str:
    """Where the LLM's packed base lies in the ablation's folder."""
    return f"packed/llm_{weights}"


def jobs(ways: list[str], seeds: range) -> list[Job]:
    """Packing of the bases, and every training."""
    packing = [
        Job(w, "quantize", ("--input=bases/llm", f"--output={base(w)}", f"--weights={w}"))
        for w in PACKED
    ]
    return packing + [training(name, seed) for seed in seeds for name in ways]


def training(name: str, seed: int) -> Job:
    """One training of stage 3."""
    way, run = WAYS[name], f"{name}-{seed}"
    told = ["--config.validation.every=0"]
    told += [f"--config.steps={STEPS.value}"] if STEPS.value else []
    if way.weights:
        told += [f"--config.init.llm={base(way.weights)}"]
        told += [f"--config.parts.llm.weights={way.weights}"]
    arguments = ("--config=stage3_instruction:tiny", f"--workdir=runs/{run}")
    seeded = (f"--config.seed={seed}",) if seed else ()
    needs = (way.weights,) if way.weights else ()
    return Job(run, "train", (*arguments, *seeded, *told, *way.flags), needs)


def prepare(demo: Path) -> Path:
    """The ablation's folder in a demo's, with links to what they share.

    Raises:
      UserError: the demo has not run.
    """
    for name in STAGE2:
        if not (demo / "runs" / name / "final").is_dir():
            what = f"holds no finished run {name}"
            raise UserError(what, field=f"--output={demo}", hint="Run xllm demo first")
    folder = demo / "ablation"
    disk.make_folder(demo / "cache")
    disk.make_folder(folder / "runs")
    shared = {name: name for name in (*SHARED, *(f"runs/{run}" for run in STAGE2))}
    stage3 = demo / "runs" / STAGE3
    if ended(stage3):  # as it is trained here, too
        shared[f"runs/adapters-{load_run.stage_of(stage3).seed}"] = f"runs/{STAGE3}"
    for name, source in shared.items():
        link, target = folder / name, os.path.relpath(demo / source, (folder / name).parent)
        if not (link.is_symlink() or link.exists()):
            link.symlink_to(target, target_is_directory=True)
    return folder


@dataclasses.dataclass(frozen=True)
class Asked:
    """Who answers: a run, before its training or behind it, with its own base or a packed one."""

    name: str
    run: str
    before: bool = False
    weights: str = ""


def asked(ways: list[str], seeds: range) -> Iterator[Asked]:
    """All that answer."""
    first = f"adapters-{seeds[0]}"
    for weights in ("", *PACKED):
        yield Asked("_".join(filter(None, ("before", weights))), first, True, weights)
    for seed in seeds:
        yield from (Asked(f"{name}-{seed}", f"{name}-{seed}") for name in ways)
        yield from (Asked(f"answers_{w}-{seed}", f"adapters-{seed}", False, w) for w in PACKED)


class Examiner:
    """Asks runs the tasks, and keeps what was measured.

    Args:
      folder: of the ablation.
      tasks: {name: task}.
    """

    def __init__(self, folder: Path, tasks: dict[str, measure.Task]):
        self.folder, self.tasks, self._networks = folder, tasks, None
        began = [folder / "runs" / name / "final" for name in STAGE2]
        bases = [folder / base(weights) for weights in PACKED]
        # Those that answer take parts of these, too.
        self._about = {
            "code": fingerprint.digest(json.dumps(fingerprint.code()).encode()),
            "beside": [answer_store.identity(place) for place in (*began, *bases)],
            "samples": {name: len(task.examples) for name, task in tasks.items()},
        }

    def __call__(self, who: Asked) -> ablation.Measured:
        """What a run scores; a file of an earlier call is taken where nothing has changed."""
        run = self.folder / "runs" / who.run
        file = self.folder / "measured" / f"{who.name}.json"
        about = self._about | {"run": answer_store.identity(run / "final")}
        known = bounded.read_json(file) if file.is_file() else {}
        if known.get("about") == about:
            return known["tasks"]
        answer = self._load(run, who)
        found = {name: measure.measure(task, answer) for name, task in self.tasks.items()}
        disk.make_folder(file.parent)
        atomic.write_json(file, {"about": about, "tasks": found})
        return found

    def _load(self, run: Path, who: Asked) -> Callable:
        replaced = dict.fromkeys(load_run.stage_of(run).modalities, "") if who.before else {}
        replaced = {f"{name}_interface": source for name, source in replaced.items()}
        if who.weights:
            replaced[LLM] = str(self.folder / base(who.weights))
        restored = load_run.load_run(run, replaced)
        # The same networks for all, so that what has the same parameters compiles once.
        self._networks = self._networks or restored.model
        restored = dataclasses.replace(restored, model=self._networks)
        return assistant.Assistant(restored, ROWS).answers


def examine(folder: Path, ways: list[str], seeds: range) -> dict[str, ablation.Measured]:
    """Asks all, one after another, with a line for each."""
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    # As for the trainings.
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
    tasks = demo_suite.tasks(folder / "world", LIMIT.value)
    wanted = {name: tasks[name] for name in ablation.TASKS if name in tasks}
    ask, found = Examiner(folder, wanted), {}
    for who in asked(ways, seeds):
        found[who.name] = ask(who)
        shown = ", ".join(f"{n} {ablation.value(found[who.name], n):.3f}" for n in wanted)
        print(f"{who.name}: {shown}", flush=True)
    return found


def rows(
    found: dict[str, ablation.Measured], ways: list[str], seeds: range
) -> dict[str, dict[str, Any]]:
    """{row: its title and what all seeds say of it}, differences to the adapters' or to floats'."""
    runs = {name: {s: found[f"{name}-{s}"] for s in seeds} for name in ways}
    answers = {w: {s: found[f"answers_{w}-{s}"] for s in seeds} for w in PACKED}
    made = {"before": ablation.row("before stage 3", {0: found["before"]})}
    for name, measured in runs.items():
        than = None if name == "adapters" else runs["adapters"]
        made[name] = ablation.row(WAYS[name].title, measured, than, "adapters")
    for w in PACKED:
        title = f"before stage 3, answered with an {w} base"
        one = {0: found[f"before_{w}"]}
        made[f"before_{w}"] = ablation.row(title, one, {0: found["before"]}, "before")
        title = f"adapters, answered with an {w} base"
        made[f"answers_{w}"] = ablation.row(title, answers[w], runs["adapters"], "adapters")
    return made


def main(_: list[str]) -> None:
    for name in ONLY.value:
        if name not in WAYS:
            raise UserError(f"unknown way {name!r}", field="--only", hint=cli.nearest(name, WAYS))
    ways = [name for name in WAYS if not ONLY.value or name in ("adapters", *ONLY.value)]
    seeds = range(SEEDS.value)
    folder = prepare(Path(OUTPUT.value).absolute())
    check_steps(folder)
    run_all(waiting(folder, jobs(ways, seeds)), folder, SLOTS.value, "ablation")
    found = rows(examine(folder, ways, seeds), ways, seeds)
    about = {
        "seeds": list(seeds),
        "steps": steps(),
        "limit": LIMIT.value,
        "llm": identity(folder / "bases" / LLM),
        "commit": fingerprint.commit(),
        "machine": fingerprint.machine(),
        "rows": found,
    }
    shown = page.table(about)
    atomic.write_json(folder / "ablation.json", about)
    atomic.write_text(folder / "ablation.txt", text.table(shown) + "\n")
    print(f"\n{text.table(shown)}\n\nAs JSON: {os.path.relpath(folder / 'ablation.json')}")


def identity(llm: Path) -> str:
    """Hash of an LLM's kernels."""
    about = base_description.base_about(llm)
    return checksum.of_json(kernel_fingerprint.of_leaves(checkpoint.open_leaves(llm), about))


def steps() -> int:
    """Updates of each training."""
    return STEPS.value or stage3_instruction.get_config("tiny").steps


def waiting(folder: Path, made: list[Job]) -> list[Job]:
    """The jobs that are still to run, which wait for one another alone."""
    todo = [job for job in made if not done(folder, job)]
    names = {job.name for job in todo}
    return [dataclasses.replace(job, needs=tuple(names & {*job.needs})) for job in todo]


def check_steps(folder: Path) -> None:
    """Refuses other trainings than those that are there: they would go on from these, under the
    schedule of another length.

    Args:
      folder: of the ablation.

    Raises:
      UserError: a run has ended with another number of steps; names it.
    """
    for run in sorted((folder / "runs").iterdir()):
        way = run.name.rpartition("-")[0]
        if way in WAYS and (run / "final").is_dir() and not ended(run):
            had = base_description.base_about(run / "final")["stage"]["steps"]
            hint = f"Say --steps={had}, or remove {os.path.relpath(folder)} first"
            what = f"is {steps()}, and {run.name} has ended with {had} steps"
            raise UserError(what, field="--steps", hint=hint)


def done(folder: Path, job: Job) -> bool:
    """Whether a training has ended, or a base is packed; whether the rest fits, loading it tells.

    Raises:
      UserError: a base was packed of another LLM than the demo's.
    """
    if job.command == "train":
        return ended(folder / "runs" / job.name)
    packed = folder / base(job.name)
    if not checkpoint.base_exists(packed):
        return False
    ours, theirs = (adapter_source.kernels_in(one, LLM) for one in (packed, folder / "bases" / LLM))
    other = next((path for path in sorted(ours) if theirs.get(path) != ours[path]), None)
    if other:
        what = f"was made of another LLM than the demo's: {other} has other values"
        hint = f"Remove {os.path.relpath(folder)} first: its runs are of that LLM, too"
        raise UserError(what, field=str(packed), hint=hint)
    return True


def ended(run: Path) -> bool:
    """Whether a run has ended with as many steps."""
    final = run / "final"
    return final.is_dir() and base_description.base_about(final)["stage"]["steps"] == steps()


if __name__ == "__main__":
    cli.run(main, "Finished trainings are kept, and the same command continues")
