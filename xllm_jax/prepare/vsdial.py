"""VSDial-CN from VisDial: questions and answers translated, every question spoken once.

Reads VisDial's own JSON and a table of translations ({text: translation}, made by any model), and
writes the layout that `sources/vsdial_cn.py` reads:

    OUTPUT/visdial_1.0_SPLIT.json       VisDial's form in Chinese, with "speech" in every round
    OUTPUT/audio/….flac                 one file for all rounds that ask the same

Rounds whose question or answer has no translation are left out, and counted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.sources import layout
from xllm_jax.prepare import plan, transforms


def build(
    visdial: str,
    translations: str,
    output: str,
    split: str = "train",
    engine: transforms.Engine | None = None,
    arguments: Sequence[str] = ("--runner=DirectRunner",),
) -> dict[str, int]:
    """Makes one split.

    Args:
      visdial: folder of visdial_1.0_SPLIT.json.
      translations: JSON file, {text: translation}.
      output: folder of the new set.
      split: of VisDial.
      engine: text to speech; espeak-ng by default.
      arguments: Beam's pipeline options.

    Returns:
      {'rounds', 'left_out', 'questions' (spoken, without doubles)}.

    Raises:
      UserError: a missing or misshapen file, or no round that is translated.
    """
    file = Path(visdial) / f"visdial_1.0_{split}.json"
    data = layout.get(layout.read_json(file), "data", dict, str(file))
    table = layout.read_json(Path(translations))
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise UserError("is no table of texts", field=translations, mend='{"text": "translation"}')
    asked = sorted({data["questions"][r["question"]] for d in data["dialogs"] for r in d["dialog"]})
    folder = Path(output) / "audio"
    folder.mkdir(parents=True, exist_ok=True)
    _speak(asked, table, str(folder), engine, arguments)
    files = {transforms.same(text): name for text, name in _spoken(folder).items()}
    made, counts = _translated(data, table, files)
    if not counts["rounds"]:
        raise UserError("translates no round", field=translations)
    plan.write(Path(output) / file.name, {"split": split, "version": "1.0", "data": made})
    return counts | {"questions": len(files)}


def _speak(
    asked: Sequence[str],
    table: dict[str, str],
    folder: str,
    engine: transforms.Engine | None,
    arguments: Sequence[str],
) -> None:
    """Every question in Chinese, once, to a file; what was said is noted beside it."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(options=PipelineOptions(list(arguments))) as pipeline:
        english = pipeline | beam.Create(list(asked))
        chinese = transforms.translated(english, table) | "chinese" >> beam.Map(lambda kv: kv[1])
        files = transforms.spoken(transforms.deduplicated(chinese), folder, engine)
        _ = files | "note" >> beam.Map(note)


def note(said: tuple[str, str]) -> None:
    """Notes beside a file what it says."""
    text, file = said
    plan.write(Path(file).with_suffix(".json"), {"text": text})


def _spoken(folder: Path) -> dict[str, str]:
    """{text: name of its file} of everything that has been said."""
    notes = sorted(folder.glob("*.json"))
    return {json.loads(one.read_text("utf-8"))["text"]: f"{one.stem}.flac" for one in notes}


def _translated(
    data: dict[str, Any], table: dict[str, str], files: dict[str, str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """VisDial's data in Chinese: the same numbers for the same texts."""
    pools = {name: [table.get(t, "").strip() for t in data[name]] for name in _POOLS}
    dialogs, rounds, left_out = [], 0, 0
    for talk in data["dialogs"]:
        kept = []
        for one in talk["dialog"]:
            question, answer = pools["questions"][one["question"]], pools["answers"][one["answer"]]
            if question and answer:
                name = files[transforms.same(question)]
                kept.append({**one, "speech": f"audio/{name}"})
            else:
                left_out += 1
        rounds += len(kept)
        caption = table.get(talk.get("caption", ""), "")
        dialogs.append({**talk, "caption": caption, "dialog": kept})
    return {**pools, "dialogs": dialogs}, {"rounds": rounds, "left_out": left_out}


_POOLS = ("questions", "answers")
