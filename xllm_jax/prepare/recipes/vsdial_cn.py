"""VSDial-CN from VisDial: questions and answers translated, every question spoken once.

Writes the layout that `sources/vsdial_cn.py` reads, and shards of it:

    OUTPUT/visdial_1.0_SPLIT.json       VisDial's form in Chinese, with "speech" in every round
    OUTPUT/audio/….flac                 one file for all rounds that ask the same
    OUTPUT/shards/asr, spoken           prepared sets: questions alone, and with their images
    OUTPUT/once/                        every question once, for the reader 'selection' (the paper
                                        aligns speech on these, and recognizes all rounds before)

Translations come from a table ({text: translation}, made by anything; the recipe 'questions' lists
the texts), from mBART-50 or an endpoint, as in the recipe 'translated'; speech from espeak-ng or an
engine of your own. Rounds whose question or answer has no usable translation are left out, and
counted; OUTPUT/SPLIT_translated.json says why. What is translated or spoken already is not done
again.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import atomic, bounded, disk, litter
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data.media.reach import Reach
from xllm_jax.data.rows.translated import same, translatable
from xllm_jax.prepare import engine as engines
from xllm_jax.prepare import pick, preparation, runner, transforms, translation_faults, translators
from xllm_jax.prepare.endpoint import Endpoint
from xllm_jax.prepare.recipes import questions, translated

POOLS = ("questions", "answers")


def build(
    input: str,
    output: str,
    split: str = "train",
    translations: str = "",
    translator: str = "",
    engine: str = "",
    images: str = "",
    endpoint: Endpoint | None = None,
    beam: Sequence[str] = (),
    workers: int = 0,
) -> dict[str, Any]:
    """Makes one split.

    Args:
      input: folder of visdial_1.0_SPLIT.json.
      output: folder of the new set.
      split: of VisDial.
      translations, translator, endpoint: as of `translators.Way`.
      engine: 'module:function' from a text to `[samples]` float32 at 16 kHz; '' is espeak-ng.
      images: folder of VisDial's images; without it there are no shards of 'spoken'.
      beam, workers: as of `runner.options`.

    Returns:
      {'rounds', 'left_out', 'questions' (spoken, without doubles), 'shards': {kind: records}}, and
      what an endpoint cost.

    Raises:
      UserError: what `translators` raises, a missing or misshapen file, no such engine, or no round
        that is translated.
    """
    say = engine_named(engine)
    way = translators.Way(translations, translator, endpoint)
    with Reach([input]).holding():
        data = questions.read(input, split)
    texts = questions.collect(questions.texts(data), output, split)
    found, cost = translators.outputs(texts, way, output, split, beam, workers)
    known, reasons = translation_faults.judged(found)
    atomic.write_json(Path(output) / f"{split}_translated.json", cost | {"reasons": reasons})
    table = completed(data, known)
    asked = {data["questions"][r["question"]] for d in data["dialogs"] for r in d["dialog"]}
    folder = Path(output) / "audio"
    speak(sorted(asked), table, folder, Path(output) / f"{split}_spoken.json", say, beam, workers)
    files = {same(text): name for text, name in spoken(folder).items()}
    made, counts = in_chinese(data, table, files)
    if not counts["rounds"]:
        raise UserError("translates no round", field=way.name)
    file = Path(output) / f"visdial_1.0_{split}.json"
    atomic.write_json(file, {"split": split, "version": "1.0", "data": made})
    pick_once(made, output, split)
    kinds = ("asr", "spoken") if images else ("asr",)
    shards = {kind: prepare(output, split, kind, images, beam, workers) for kind in kinds}
    atomic.remove_partial(Path(output))
    said = {name for d in made["dialogs"] for r in d["dialog"] for name in [r["speech"]]}
    return counts | {"questions": len(said), "shards": shards} | cost


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


def completed(data: dict[str, Any], known: Mapping[str, str]) -> dict[str, str]:
    """{text: translation} of every text that has one, or that says what a text with one says."""
    every = questions.texts(data)
    found = translators.looked_up([text for text in every if translatable(text)], known)
    found |= {text: text for text in every if not translatable(text)}
    return {text: said for text, said in found.items() if said}


def speak(
    asked: Sequence[str],
    table: Mapping[str, str],
    folder: Path,
    listed: Path,
    engine: transforms.Engine,
    beam: Sequence[str],
    workers: int,
) -> None:
    """Says every Chinese question once, to a file; its text is in a JSON file next to it."""
    disk.make_folder(folder)
    once = translated.unique(table[text] for text in asked if text in table)
    say = Say(str(folder), engine)
    notes = {say.file(text).with_suffix(".json"): 1 for text in once}
    with engines.Progress("speak", len(once), engines.Finished(notes)):
        runner.mapped(say, once, listed, beam, workers)


class Say(transforms.Speak):
    """Says a text to a file, and writes it into a JSON file next to it."""

    def __call__(self, text: str) -> tuple[str, str]:
        """The text and its audio file."""
        said = super().__call__(text)
        atomic.write_json(self.file(text).with_suffix(".json"), {"text": text})
        return said


def spoken(folder: Path) -> dict[str, str]:
    """{text: name of its file} of everything that has been said."""
    notes = litter.glob(folder, "*.json")
    return {bounded.read_json(one)["text"]: f"{one.stem}.flac" for one in notes}


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
                name = files[same(question)]
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
