"""The evaluation of the whole demo: which tasks, asked of which models, compared how.

The models: the ASR model of stage 1 ('asr'); X-LLM put together from the stage-2 runs, before any
instruction tuning ('before'); the same after stage 3 ('after'), and with signal tokens, so that its
answers may hold pictures ('draws'); with an image interface that saw half of the pairs in stage 2
('half'), and with one that saw as many and started from nothing ('no_init').
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.core.text_lines import split_lines
from xllm_jax.data import mixture
from xllm_jax.data.example import Example
from xllm_jax.evaluation import measure, scorers

Progress = Callable[[str], None]

SOURCES = {
    "caption": Source("coco", "coco", "test"),
    "vqa": Source("visual_genome", "visual_genome", "test", {"kind": "questions"}),
    "video": Source("msrvtt", "msrvtt", "test"),
    "sentences": Source("aishell", "aishell", "test"),
    "questions": Source("visdial", "visdial", "test", {"kind": "asr"}),
    "spoken": Source("visdial", "visdial", "test", {"kind": "spoken"}),
}
TITLES = {
    "caption": "Image captions",
    "vqa": "Visual question answering",
    "video": "Video captions",
    "sentences": "Speech recognition, sentences (S)",
    "questions": "Speech recognition, questions (S)",
    "questions_image": "Speech recognition, questions (S+V)",
    "spoken": "Spoken visual question answering",
}
SCORERS = {
    "caption": scorers.caption,
    "vqa": scorers.short_answer,
    "video": scorers.video_caption,
    "spoken": scorers.short_answer,
}  # the others are transcriptions
# Most samples of a task; enough for intervals of a few percent.
MOST = {"vqa": 450}
MODELS = {
    "asr": "stage 1",
    "before": "before stage 3",
    "after": "",
    "draws": "beside pictures",
    "half": "half of the pairs",
    "no_init": "half of the pairs, no init",
}
# {model: tasks}; with controls where they are named a second time.
PLAN = {
    "asr": ("sentences", "questions"),
    "no_init": ("caption", "vqa"),
    "half": ("caption", "vqa"),
    "before": ("caption", "vqa", "video", "sentences", "questions", "questions_image", "spoken"),
    "after": ("vqa", "caption", "spoken", "video", "sentences", "questions", "questions_image"),
    "draws": ("vqa", "caption"),
}
CONTROLLED = {
    "before": ("caption", "vqa", "spoken"),
    "after": ("vqa", "caption", "spoken", "video", "sentences"),
}
# name in the report: (first, second, metric); positive where the second is better
COMPARED = {
    "init_cider": ("caption@no_init", "caption@half", "cider"),
    "init_vqa": ("vqa@no_init", "vqa@half", "accuracy"),
    "pairs_cider": ("caption@half", "caption@before", "cider"),
    "pairs_vqa": ("vqa@half", "vqa@before", "accuracy"),
    "stage3_spoken": ("spoken@before", "spoken@after", "accuracy"),
    "stage3_transcripts": ("questions_image@before", "questions_image@after", "cer"),
    "draws_vqa": ("vqa@after", "vqa@draws", "accuracy"),
    "draws_caption": ("caption@after", "caption@draws", "cider"),
}


def tasks(
    data: str | Path,
    limit: int = 0,
    allow_paths: Sequence[str] = (),
    cer_form: str = "normalized",
) -> dict[str, measure.Task]:
    """The held-out tasks of a data folder in the world's layout; what it lacks is left out.

    Args:
      data: folder with coco/, visual_genome/, msrvtt/, aishell/ and visdial/.
      limit: most samples of a task, spread over it; 0 takes MOST.
      allow_paths: folders that its files may lie in, too.
      cer_form: in which form transcripts are compared, a name of `error_rate.FORMS`.

    Raises:
      UserError: the folder has none of them, or one is broken.
    """
    if not Path(data).is_dir():
        raise UserError("no such folder", field=str(data), hint="xllm world builds one")
    allowed = {
        name: dataclasses.replace(source, allow_paths=tuple(allow_paths))
        for name, source in SOURCES.items()
    }
    found = {
        name: spread(mixture.read(name, source, str(data)), limit or MOST.get(name, 300))
        for name, source in allowed.items()
        if (Path(data) / source.path).is_dir()
    }
    if not found:
        known = ", ".join(sorted({source.path for source in SOURCES.values()}))
        raise UserError(f"holds none of {known}", field=str(data), hint="Give the world's folder")
    if "spoken" in found:
        found["questions_image"] = [transcribing(example) for example in found["spoken"]]
    heard = functools.partial(scorers.transcription, form=cer_form)
    return {
        name: measure.Task(name, TITLES[name], tuple(examples), SCORERS.get(name, heard))
        for name, examples in found.items()
    }


def transcribing(example: Example) -> Example:
    """The example of a spoken question as a request to write the question down."""
    changed = {"task": "asr", "instruction": "", "answer": example.transcript}
    return dataclasses.replace(example, **changed)


def spread(examples: Sequence[Example], most: int) -> list[Example]:
    """At most `most` examples, at equal distances, so that all kinds stay."""
    if len(examples) <= most:
        return list(examples)
    return [examples[int(i)] for i in np.linspace(0, len(examples) - 1, most).round()]


def run(
    todo: Mapping[str, measure.Task],
    models: Mapping[str, Callable[[], measure.Answer]],
    progress: Progress = print,
) -> dict[str, Any]:
    """Asks every model its tasks.

    Args:
      todo: {task: Task}.
      models: {model: function that loads it and returns what answers}; called one after another,
        so that only one model is in memory.
      progress: called with one line after each task.

    Returns:
      {'measures', 'comparisons'} as the report reads them.
    """
    measures: dict[str, Any] = {}
    for model, load in models.items():
        answer = load()
        for name in PLAN[model]:
            if name not in todo:
                continue
            suffix = f", {MODELS[model]}" if MODELS[model] else ""
            task = dataclasses.replace(todo[name], title=todo[name].title + suffix)
            controls = name in CONTROLLED.get(model, ())
            found = measures[f"{name}@{model}"] = measure.measure(task, answer, controls)
            metric, score = next(iter(found["metrics"].items()))
            value = "no data" if score["value"] is None else f"{score['value']:.3f}"
            progress(f"{task.title}: {metric} {value} ({found['seconds']:.0f} s)")
    return {"measures": measures, "comparisons": comparisons(measures)}


def comparisons(measures: Mapping[str, Any]) -> dict[str, Any]:
    """Paired differences between models, and of the zero-shot answers to their control."""
    found: dict[str, Any] = {}
    for name, (first, second, metric) in COMPARED.items():
        if first in measures and second in measures:
            gain = measure.compare(measures[first], measures[second], metric)
            if gain:
                found[name] = gain | {"metric": metric}
    zero_shot = measures.get("spoken@before", {}).get("metrics", {}).get("accuracy", {})
    if "margin" in zero_shot:
        found["zero_shot"] = zero_shot["margin"] | {"metric": "accuracy"}
    return found


def curves(runs: str | Path, points: int = 160) -> dict[str, list[list[float]]]:
    """{run: [[step, loss], ...]} of every run below a folder, thinned out to `points`."""
    found = {}
    for file in sorted(Path(runs).glob("*/metrics.jsonl")):
        rows = [json.loads(line) for line in split_lines(file.read_text("utf-8")) if line]
        pairs = [[row["step"], row["loss"]] for row in rows if "loss" in row]
        if pairs:
            step = max(1, len(pairs) // points)
            found[file.parent.name] = pairs[::step]
    return found
