"""The texts of a source, each once: what has to be translated for the recipes that read a table.

    OUTPUT/SPLIT_texts.json     {text: ""}; of VisDial every question, answer and caption

Texts that differ in nothing but case, spaces and punctuation are one; the least stands for them
all. Put translations in the empty places, by whatever translates best, and give the file to the
recipe vsdial_cn or translated as --translations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data.media.reach import Reach
from xllm_jax.data.rows import json_spans
from xllm_jax.data.rows.lazy import Spans
from xllm_jax.data.rows.translated import translatable
from xllm_jax.data.sources import layout
from xllm_jax.prepare.recipes import translated

TOGETHER = 1024  # rows read with the file opened once


def build(
    input: str,
    output: str,
    split: str = "train",
    reader: str = "",
    options: Mapping[str, Any] | None = None,
    beam: Sequence[str] = (),
    workers: int = 0,
    allow_paths: Sequence[str] = (),
) -> dict[str, Any]:
    """Writes the texts of one split.

    Args:
      input: folder of visdial_1.0_SPLIT.json, or of the reader.
      output: folder of the texts.
      split: of the source.
      reader: of the source; '' is VisDial with its captions, for the recipe vsdial_cn.
      options: of the reader.
      beam, workers: as of `runner.mapped`.
      allow_paths: folders that the source's files may lie in, too.

    Returns:
      {'texts', 'different'}: how many there are, and without doubles; 'as_they_are', where some are
      Chinese or have no words, and so need no translation.

    Raises:
      UserError: no such file, a misshapen one, or one without a text that needs a translation.
    """
    if reader:
        source = Source(reader, input, split, dict(options or {}), tuple(allow_paths))
        found, _ = translated.read(source, output, beam, workers)
    else:
        with Reach([input, *allow_paths]).holding():
            found = texts(read(input, split))
    kept = sum(not translatable(text) for text in found)
    if kept == len(found):
        what = f"has no text to be translated: all {kept} are Chinese, or have no words"
        hint = "Train on it as it is, or check --input, --split and --options"
        raise UserError(what, field=input, hint=hint)
    counts = {"texts": len(found), "different": len(collect(found, output, split))}
    return counts | ({"as_they_are": kept} if kept else {})


def read(folder: str, split: str) -> dict[str, Any]:
    """What stands under "data" in VisDial's file, row by row: the published one has 0.8 GB.

    Nearly all of it are the hundred candidates of every answer ("answer_options"), which are left
    out.

    Raises:
      UserError: no such file, a misshapen one, or a broken row.
    """
    file = Path(folder) / f"visdial_1.0_{split}.json"
    names = ("questions", "answers", "dialogs")
    found = json_spans.find(file, {f"data.{name}": None for name in names})
    data = {name: list(_rows(file, found[f"data.{name}"], name)) for name in names[:2]}
    talks = _rows(file, found["data.dialogs"], names[2])
    data["dialogs"] = [
        _checked(talk, data, f"{file}: data.dialogs[{number}]") for number, talk in enumerate(talks)
    ]
    return data


def _rows(file: Path, found: json_spans.Rows, name: str) -> Iterator[Any]:
    """The values of a list, some at a time."""
    rows = Spans(file, found.spans, name)
    for start in range(0, len(rows), TOGETHER):
        yield from rows.several(range(start, min(start + TOGETHER, len(rows))))


def _checked(talk: Any, data: Mapping[str, Sequence[Any]], where: str) -> dict[str, Any]:
    """A dialogue without candidates, whose rounds name texts that there are."""
    kept = []
    for number, one in enumerate(layout.get(talk, "dialog", list, where)):
        place = f"{where}.dialog[{number}]"
        for name in ("question", "answer"):
            if name == "answer" and name not in one:
                continue
            texts, chosen = data[f"{name}s"], layout.get(one, name, int, place)
            if not 0 <= chosen < len(texts) or not isinstance(texts[chosen], str):
                raise UserError(f"{chosen} names no text", field=f"{place}.{name}")
        kept.append({name: value for name, value in one.items() if name != "answer_options"})
    caption = layout.get(talk, "caption", str, where) if "caption" in talk else ""
    return {**talk, "caption": caption, "dialog": kept}


def texts(data: dict[str, Any]) -> list[str]:
    """Every question and answer that a dialogue uses, and every caption."""
    rounds = [one for talk in data["dialogs"] for one in talk["dialog"]]
    asked = {data["questions"][one["question"]] for one in rounds}
    answered = {data["answers"][one["answer"]] for one in rounds if "answer" in one}
    captions = {talk.get("caption", "") for talk in data["dialogs"]}
    return sorted((asked | answered | captions) - {""})


def collect(found: Sequence[str], output: str, split: str) -> list[str]:
    """The texts that need a translation, without doubles; writes them, too."""
    once = translated.unique(filter(translatable, found))
    file = Path(output) / f"{split}_texts.json"
    atomic.write_json(file, dict.fromkeys(once, ""))
    atomic.remove_partial(file.parent, {file.name})
    return once
