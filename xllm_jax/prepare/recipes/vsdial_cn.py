"""VSDial-CN from VisDial: questions and answers translated, every question spoken once.

Writes the layout that `sources/vsdial_cn.py` reads, and shards of it:

    OUTPUT/visdial_1.0_SPLIT.json       VisDial's form in Chinese, with "speech" in every round
    OUTPUT/audio/….flac                 one file for all rounds that ask the same
    OUTPUT/shards/asr, spoken           prepared sets: questions alone, and with their images
    OUTPUT/once/                        every question once, for the reader 'selection' (the paper
                                        aligns speech on these, and recognizes all rounds before)

Translations come from a table ({text: translation}, made by anything; the recipe 'questions' lists
the texts) or from mBART-50; speech from espeak-ng or an engine of your own. Rounds whose question
or answer has no translation are left out, and counted. What is translated or spoken already is not
done again.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import atomic, litter
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data.sources import layout
from xllm_jax.prepare import engine as engines
from xllm_jax.prepare import pick, preparation, runner, transforms, translate
from xllm_jax.prepare.recipes import questions

POOLS = ("questions", "answers")


def build(
    input: str,
    output: str,
    split: str = "train",
    translations: str = "",
    translator: str = "",
    engine: str = "",
    images: str = "",
    beam: Sequence[str] = (),
    workers: int = 0,
) -> dict[str, Any]:
    """Makes one split.

    Args:
      input: folder of visdial_1.0_SPLIT.json.
      output: folder of the new set.
      split: of VisDial.
      translations: JSON file, {text: translation}; or
      translator: folder of an mBART-50 model.
      engine: 'module:function' from a text to `[samples]` float32 at 16 kHz; '' is espeak-ng.
      images: folder of VisDial's images; without it there are no shards of 'spoken'.
      beam, workers: as of `runner.options`.

    Returns:
      {'rounds', 'left_out', 'questions' (spoken, without doubles), 'shards': {kind: records}}.

    Raises:
      UserError: not one of table and translator, a missing or misshapen file, no such engine, or no
        round that is translated.
    """
    if bool(translations) == bool(translator):
        hint = "Give --translations=FILE, or --translator=FOLDER of an mBART-50 model"
        raise UserError("one of the two is needed", field="--translations", hint=hint)
    say = engine_named(engine)
    data = questions.read(input, split)
    texts = questions.collect(questions.texts(data), output, split, beam, workers)
    if translations:
        table = read_table(translations)
    else:
        table = translated(texts, translator, output, beam, workers)
    table = completed(data, table)
    asked = {data["questions"][r["question"]] for d in data["dialogs"] for r in d["dialog"]}
    folder = Path(output) / "audio"
    speak(sorted(asked), table, folder, say, beam, workers)
    atomic.remove_partial(folder)
    files = {transforms.same(text): name for text, name in spoken(folder).items()}
    made, counts = in_chinese(data, table, files)
    if not counts["rounds"]:
        raise UserError("translates no round", field=translations or translator)
    file = Path(output) / f"visdial_1.0_{split}.json"
    atomic.write_json(file, {"split": split, "version": "1.0", "data": made})
    pick_once(made, output, split)
    kinds = ("asr", "spoken") if images else ("asr",)
    shards = {kind: prepare(output, split, kind, images, beam, workers) for kind in kinds}
    said = {name for d in made["dialogs"] for r in d["dialog"] for name in [r["speech"]]}
    return counts | {"questions": len(said), "shards": shards}


def engine_named(name: str) -> transforms.Engine:
    """The function 'module:function', espeak-ng for ''.

    Raises:
      UserError: there is none.
    """
    if not name:
        return transforms.espeak
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        hint = "Write it as module:function, importable from here"
        raise UserError(
            f"no speech engine {name!r} ({error})", field="--engine", hint=hint
        ) from None


def read_table(file: str) -> dict[str, str]:
    """{text: translation} of a JSON file.

    Raises:
      UserError: it is something else.
    """
    table = layout.read_json(Path(file))
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
        raise UserError("is no table of texts", field=file, hint='{"text": "translation"}')
    return table


def translated(
    texts: Sequence[str], translator: str, output: str, beam: Sequence[str], workers: int
) -> dict[str, str]:
    """{text: translation} by mBART-50, kept list by list in OUTPUT/translations."""
    import apache_beam

    translate.check(translator)
    folder = Path(output) / "translations"
    folder.mkdir(parents=True, exist_ok=True)
    lists = translate.batches(texts)
    files = [translate.batch_file(str(folder), one) for one in lists]
    todo = [one for one, file in zip(lists, files) if not file.is_file()]

    def done() -> int:
        return sum(len(one) for one, file in zip(lists, files) if file.is_file())

    with engines.Progress("translate", len(texts), done), runner.pipeline(beam, workers) as made:
        found = made | apache_beam.Create(todo)
        transforms.translated_by(found, str(folder), translate.Translator(translator))
    return {k: v for file in files for k, v in json.loads(file.read_text("utf-8")).items()}


def completed(data: Mapping[str, Any], table: Mapping[str, str]) -> dict[str, str]:
    """The table for every text: where it lacks one, it has another that says the same."""
    alike = {transforms.same(text): said for text, said in table.items() if said.strip()}
    known = {}
    for text in questions.texts(data):
        said = table.get(text, "").strip() or alike.get(transforms.same(text), "").strip()
        if said:
            known[text] = said
    return known


def speak(
    asked: Sequence[str],
    table: Mapping[str, str],
    folder: Path,
    engine: transforms.Engine,
    beam: Sequence[str],
    workers: int,
) -> None:
    """Says every Chinese question once, to a file; its text is in a JSON file next to it."""
    import apache_beam

    folder.mkdir(parents=True, exist_ok=True)
    total = len({transforms.same(table[text]) for text in asked if text in table})

    def done() -> int:
        return min(total, sum(1 for _ in folder.glob("*.json")))

    with engines.Progress("speak", total, done), runner.pipeline(beam, workers) as made:
        english = made | apache_beam.Create(list(asked))
        chinese = transforms.translated(english, table)
        chinese = chinese | "chinese" >> apache_beam.Map(lambda kv: kv[1])
        once = transforms.deduplicated(chinese) | apache_beam.Reshuffle()
        _ = transforms.spoken(once, str(folder), engine) | "note" >> apache_beam.Map(note)


def note(said: tuple[str, str]) -> None:
    """Writes the text that an audio file speaks into a JSON file next to it."""
    text, file = said
    atomic.write_json(Path(file).with_suffix(".json"), {"text": text})


def spoken(folder: Path) -> dict[str, str]:
    """{text: name of its file} of everything that has been said."""
    notes = litter.glob(folder, "*.json")
    return {json.loads(one.read_text("utf-8"))["text"]: f"{one.stem}.flac" for one in notes}


def in_chinese(
    data: Mapping[str, Any], table: Mapping[str, str], files: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """VisDial's data in Chinese: the same numbers for the same texts."""
    pools = {name: [table.get(text, "") for text in data[name]] for name in POOLS}
    dialogs, rounds, left_out = [], 0, 0
    for talk in data["dialogs"]:
        kept = []
        for one in talk["dialog"]:
            question, answer = (pools[n][one[n[:-1]]] if n[:-1] in one else "" for n in POOLS)
            if question and answer:
                name = files[transforms.same(question)]
                kept.append({**one, "speech": f"audio/{name}"})
            else:
                left_out += 1
        rounds += len(kept)
        caption = table.get(talk.get("caption", ""), "")
        dialogs.append({**talk, "caption": caption, "dialog": kept})
    return {**pools, "dialogs": dialogs}, {"rounds": rounds, "left_out": left_out}


def pick_once(made: Mapping[str, Any], output: str, split: str) -> None:
    """Lists the first round of every spoken question."""
    said = [one["speech"] for talk in made["dialogs"] for one in talk["dialog"]]
    first = {name: place for place, name in reversed(list(enumerate(said)))}
    rows = np.asarray([(0, place, -1) for place in sorted(first.values())], np.int64)
    source = Source("vsdial_cn", output, split, {"kind": "asr"})
    pick.write(f"{output}/once", split, {"vsdial_cn": source}, rows)


def prepare(
    output: str, split: str, kind: str, images: str, beam: Sequence[str], workers: int
) -> int:
    """Writes shards of one kind of examples; returns how many records they hold."""
    options = {"kind": kind} | ({"images": images} if kind == "spoken" else {})
    source = Source("vsdial_cn", output, split, options)
    made = preparation.make(
        f"vsdial_cn_{kind}", source, f"{output}/shards/{kind}", preparation.PER_SHARD
    )
    return engines.run(made, beam, workers)["splits"][split]["records"]
