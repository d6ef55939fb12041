"""Measures a finished set of runs on held-out files, or one run on published sets.

    xllm evaluate --runs=demo/runs --data=demo/world --output=demo [--limit=50]

Writes report.txt, report.html (with pictures) and report.json. A run that is not there leaves its
rows out; runs/stage3 is where the parts of X-LLM are found. What is measured is kept in
OUTPUT/measured, and taken up by the next call as long as nothing has changed that it depends on;
--only=answers and --only=drawings measure that part alone, so that two can run at a time.

    xllm evaluate --runs=runs --draw=out [--limit=50]

also answers held-out requests with every run that draws, writes their pictures to out/RUN and
counts them (`pictures.json` there).

    xllm evaluate --suite=asr[:tiny] --checkpoint=RUN --output=DIR \\
        [--config=mine.py] [--config.root=data] [--config.only="('test_ios',)"] [--baseline=OTHER]

Suites (docs/evaluation.md): asr, captions, vqa, llava_test, pictures; ':tiny' takes the demo's
world. They write results.json, .txt, .md and .html, and every answer to DIR/answers; the same
command continues after an interruption. Several hosts share one evaluation with the flags of
launch/hosts.py, or --host_count and --host_index alone where they share nothing but DIR. --baseline
is the --output of another run of the suite, which is compared sample by sample.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from xllm_jax import report
from xllm_jax.core import bounded, fingerprint
from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import Suite
from xllm_jax.data.example import Example
from xllm_jax.evaluation import demo_suite, drawing_suite, error_rate, measure
from xllm_jax.inference import assistant, decoder_base, transcriber
from xllm_jax.inference.load_run import Restored, load_run, same_llm, stage_of
from xllm_jax.launch import (
    cli,
    drawing,
    evaluate_drawing,
    evaluate_pairs,
    measured,
    other_base,
    suite_models,
    unused_flags,
)
from xllm_jax.launch import hosts as host_flags

RUNS = flags.DEFINE_string("runs", "runs", "Folder that holds the runs of all stages.")
DATA = flags.DEFINE_string(
    "data", "world", "Folder of the held-out data, in the layout of the synthetic world."
)
OUTPUT = flags.DEFINE_string("output", ".", "Folder in which the report is written.")
LIMIT = flags.DEFINE_integer(
    "limit",
    0,
    "Largest number of samples of a task; 0 takes a few hundred, with --suite all.",
    0,
)
CER = flags.DEFINE_enum(
    "cer",
    "normalized",
    list(error_rate.FORMS),
    "How characters of transcripts are compared: normalized (NFKC, lower case, no spaces, "
    "punctuation or symbols), untagged (also without tags such as <NOISE>), raw, or xllm (as the "
    "X-LLM repository does).",
)
PICTURES = 16  # drawn at a time
ROWS = flags.DEFINE_integer(
    "rows", 32, "Number of questions that are answered at a time.", 1, 65536
)

ANSWERS, DRAWINGS = "answers", "drawings"
ONLY = flags.DEFINE_enum(
    "only", "", ["", ANSWERS, DRAWINGS], "Measure this part alone, for a later report."
)

DRAW = flags.DEFINE_string(
    "draw",
    "",
    "Folder for pictures of held-out requests, by every run whose answers hold some.",
    allow_override=True,
)
SEED = flags.DEFINE_integer(
    "seed", 0, "With --draw: of the noise that a picture begins with.", 0, allow_override=True
)
SUITE = flags.DEFINE_string(
    "suite", "", "Suite on published data: " + ", ".join(suite_models.SUITES) + "; NAME:tiny."
)
CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "With --suite: a file whose get_config returns a Suite; else the packaged one.",
    allow_override=True,
)
CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    "",
    "With --suite: folder of the finished run that answers.",
    allow_override=True,
)
BASELINE = flags.DEFINE_string(
    "baseline", "", "With --suite: the --output of another run of it, to compare with."
)
flags.adopt_module_key_flags(host_flags)
flags.adopt_module_key_flags(other_base)

STAGE1_IMAGE, PAIRS = "stage1_image", 300
ASR, STAGE3 = "stage1_speech", "stage3"
IMAGE_RUNS = {"no_init": "stage2_image_no_init", "half": "stage2_image_half"}
DRAWS, MODALITY = "stage_output_image", "image"
flags.declare_key_flag("allow_paths")
for name in drawing.OPTIONS:
    flags.declare_key_flag(name)


def main(_: list[str]) -> None:
    if SUITE.value:
        config = suite_models.limited(
            CONFIG.value,
            ROWS.value if ROWS.present else None,
            LIMIT.value if LIMIT.present else None,
        )
        return suite_models.evaluate(
            SUITE.value.partition(":")[0],
            config,
            suite_models.Asked(CHECKPOINT.value, other_base.BASE.value),
            OUTPUT.value,
            BASELINE.value,
        )
    for flag in (CHECKPOINT, BASELINE, other_base.BASE, host_flags.HOSTS, host_flags.COUNT):
        if flag.value:
            raise UserError("goes with --suite", field=f"--{flag.name}", hint="Give --suite=NAME")
    if DRAW.value:
        if ONLY.value:
            raise UserError("goes without --draw", field="--only", hint="Leave one of them out")
        draw_all(Path(RUNS.value))
        if not any(ended(Path(RUNS.value) / name) for name in (ASR, STAGE3)):
            return
    else:
        drawing.check_unused("without --draw", "Add --draw=DIR", SEED.name)
    unused_flags.refuse("here", "X-LLM draws with the run stage_output_image of --runs", "outputs")
    measure_all(Path(RUNS.value), Path(OUTPUT.value))


def measure_all(runs: Path, output: Path) -> None:
    """Measures what X-LLM answers and draws, and writes the report unless --only says otherwise."""
    began, code = time.monotonic(), fingerprint.code()
    base = decoder(runs)
    if ONLY.value == DRAWINGS and not base:
        hint = "Train and evaluate with a base of the decoder"
        raise UserError(f"no run {DRAWS} that draws", field=f"--runs={runs}", hint=hint)
    options = {"limit": LIMIT.value, "rows": ROWS.value, "cer": CER.value}
    measures: dict[str, Any] = {}
    if ONLY.value != DRAWINGS:
        todo = demo_suite.tasks(DATA.value, LIMIT.value, cli.ALLOW_PATHS.value, CER.value)
        asked = [example for task in todo.values() for example in task.examples]
        used = (ASR, STAGE3, STAGE1_IMAGE, DRAWS, *IMAGE_RUNS.values())
        key = measured.key_of([runs / name / "final" for name in used], asked, options, code)
        found = models(runs)
        measures |= measured.part(
            ANSWERS, output, key, lambda: demo_suite.run(todo, found)["measures"] | pairs(runs)
        )
    if base and ONLY.value != ANSWERS:
        used = [runs / STAGE3 / "final", runs / DRAWS / "final", base.folder]
        key, folder = measured.key_of(used, to_draw_again(), options, code), output / "pictures"
        made = functools.partial(drawings, runs, base, folder)
        measures |= measured.part(DRAWINGS, output, key, made, [folder])
    if not ONLY.value:
        write(measures, runs, output, time.monotonic() - began)


def write(measures: dict[str, Any], runs: Path, output: Path, seconds: float) -> None:
    """Writes the report of all measures and prints it.

    Args:
      measures: of all parts.
      runs: of all stages.
      output: its folder.
      seconds: that this evaluation took.
    """
    times = timings(seconds)
    results = {
        "measures": measures,
        "comparisons": demo_suite.comparisons(measures) | drawing_suite.comparisons(measures),
        "curves": demo_suite.curves(runs),
        "timings": times,
        "cer": error_rate.STATED[CER.value],
        "settings": settings(times),
    }
    print()
    print(report.write(results, output))
    print(f"\nWith pictures: {output / 'report.html'}")


def draw_all(runs: Path) -> None:
    """Draws with every run below a folder that can, and prints a line for each."""
    found = evaluate_drawing.runs_in(runs)
    arguments = (Path(DRAW.value), LIMIT.value, ROWS.value, SEED.value)
    made = [(run.name, evaluate_drawing.evaluate(run, *arguments)) for run in found]
    print(evaluate_drawing.table(made))
    print(f"Pictures: {DRAW.value}")


def models(runs: Path) -> dict[str, Callable[[], measure.Answer]]:
    """Loaders of the models whose runs have ended.

    Raises:
      UserError: none has.
    """
    found: dict[str, Callable[[], measure.Answer]] = {}
    if ended(runs / ASR):
        found["asr"] = lambda: transcriber.Transcriber(load_run(runs / ASR), 16).transcribe
    if ended(runs / STAGE3):
        found |= stage3_models(runs)
    if not found:
        raise UserError(
            f"no finished run {ASR} or {STAGE3} here", field=f"--runs={runs}", hint="Train first"
        )
    return found


def stage3_models(runs: Path) -> dict[str, Callable[[], measure.Answer]]:
    """X-LLM before and after stage 3, and with the image interfaces of `IMAGE_RUNS`."""
    first: list[Restored] = []

    def load(replaced: dict[str, str]) -> measure.Answer:
        restored = load_run(runs / STAGE3, replaced)
        # The same networks for all, so that nothing compiles twice.
        first[:] = first or [restored]
        restored = dataclasses.replace(restored, model=first[0].model)
        return assistant.Assistant(restored, ROWS.value).answers

    def draws() -> measure.Answer:
        restored = load_run(runs / STAGE3, outputs=runs / DRAWS)
        return assistant.Assistant(restored, ROWS.value).answers

    trained = [f"{modality}_interface" for modality in ("image", "video", "speech")]
    before = dict.fromkeys(trained, "")
    found = {"before": lambda: load(before), "after": lambda: load({})}
    if ended(runs / DRAWS) and same_llm(runs / STAGE3, runs / DRAWS):
        found["draws"] = draws
    others = {
        model: before | {"image_interface": str(runs / name)}
        for model, name in IMAGE_RUNS.items()
        if ended(runs / name)
    }
    return {name: functools.partial(load, row) for name, row in others.items()} | found


def pairs(runs: Path) -> dict[str, Any]:
    """What stage 1 knows of held-out pictures and captions, where it has ended."""
    source, run = demo_suite.SOURCES["caption"], runs / STAGE1_IMAGE
    if not ended(run) or not (Path(DATA.value) / source.path).is_dir():
        return {}
    source = dataclasses.replace(source, allow_paths=tuple(cli.ALLOW_PATHS.value))
    restored, most = load_run(run), LIMIT.value or PAIRS
    return {"pairs@stage1": evaluate_pairs.evaluate(restored, DATA.value, source, most)}


def decoder(runs: Path) -> decoder_base.DecoderBase | None:
    """What draws for the run DRAWS, looked at; None where one of the two is not there.

    Raises:
      UserError: the decoder does not fit the run, or is damaged.
    """
    if not ended(runs / DRAWS):
        return None
    stage = stage_of(runs / DRAWS)
    if MODALITY not in stage.outputs:
        return None
    base = decoder_base.of_stage(stage, MODALITY)
    if base is None:
        where = decoder_base.missing(stage, MODALITY)
        print(f"No decoder of {MODALITY} ({where}): its rows are left out", file=sys.stderr)
    return base


def drawings(runs: Path, base: decoder_base.DecoderBase, folder: Path) -> dict[str, Any]:
    """Measures the pictures of held-out requests.

    Args:
      runs: of all stages; X-LLM of stage 3 draws with what DRAWS learned, if both are there.
      base: of the decoder.
      folder: for those pictures that the report shows.

    Returns:
      {name of the measure: as of `measure.measure`}.
    """
    renderer, how = base.renderer(PICTURES), drawing_suite.Rendering(base.size)
    joined = ended(runs / STAGE3) and same_llm(runs / STAGE3, runs / DRAWS)
    restored = load_run(runs / STAGE3, outputs=runs / DRAWS) if joined else load_run(runs / DRAWS)
    model = assistant.Assistant(restored, ROWS.value)
    asked = drawing_suite.requests(LIMIT.value or drawing_suite.COUNT)
    found = drawing_suite.run(
        "Requests to draw",
        asked,
        drawing_suite.by_answers(model.replies, renderer, how),
        folder,
        {
            drawing_suite.CEILING: drawing_suite.by_words(base, renderer, how),
            "unconditional": drawing_suite.by_words(base, renderer, how, words=False),
        },
    )
    made = {"drawing": found}
    if joined:
        frames = stage_of(runs / STAGE3).data.frames[-1]
        heard = drawing_suite.spoken(asked, folder / "speech", frames)
        draw = drawing_suite.by_answers(model.replies, renderer, how)
        made["drawing_spoken"] = drawing_suite.run(
            "Spoken requests to draw", heard, draw, folder / "spoken"
        )
    again = to_draw_again()
    if joined and again:
        draw = drawing_suite.by_answers(model.replies, renderer, how)
        made["drawing_edits"] = drawing_suite.run(
            "Pictures to draw again in another color", again, draw, folder / "edits"
        )
    for one in made.values():
        looks = one["metrics"]["looks"]["value"]
        print(f"{one['title']}: looks {looks:.3f} ({one['seconds']:.0f} s)")
    return made


def to_draw_again() -> list[Example]:
    """Requests for the data's pictures in another color, where it is a world that knows them."""
    if not (Path(DATA.value) / "world.json").is_file():
        return []
    return drawing_suite.edits(DATA.value, LIMIT.value or drawing_suite.COUNT)


def ended(run: Path) -> bool:
    """Whether a run has written its result."""
    return (run / "final").is_dir()


def settings(seconds: Mapping[str, float]) -> dict[str, str]:
    """How the report came about: what was measured, by which code, where, and how long it took.

    Args:
      seconds: of every step.
    """
    run = Path(RUNS.value) / STAGE3
    seed = str(stage_of(run).seed) if ended(run) else "unknown"
    return {
        "runs": RUNS.value,
        "data": DATA.value,
        "limit": str(LIMIT.value or "none"),
        "seed": seed,
        "commit": fingerprint.commit(),
        "code": fingerprint.digest(json.dumps(fingerprint.code()).encode()),
        "machine": fingerprint.machine(),
        "duration of all steps": f"{sum(seconds.values()):.0f} s",
    }


def timings(seconds: float) -> dict[str, float]:
    """Seconds of every step of the demo so far, and of this evaluation."""
    file = Path(OUTPUT.value) / "timings.json"
    known = bounded.read_json(file) if file.is_file() else {}
    return {**known, "evaluate": seconds}


if __name__ == "__main__":
    sys.argv = suite_models.with_config(sys.argv)
    cli.run(main, "The runs are as they were, and the same command continues", Suite)
