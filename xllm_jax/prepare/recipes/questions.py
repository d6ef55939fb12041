"""The texts of VisDial, each once: what has to be translated for VSDial-CN.

    OUTPUT/SPLIT_texts.json     {text: ""} of every question, answer and caption

Texts that differ in nothing but case, spaces and punctuation are one; the least stands for them
all. Put translations in the empty places, by whatever translates best, and give the file to the
recipe vsdial_cn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic
from xllm_jax.data.sources import layout
from xllm_jax.prepare import runner, transforms


def build(
    input: str, output: str, split: str = "train", beam: Sequence[str] = (), workers: int = 0
) -> dict[str, Any]:
    """Writes the texts of one split.

    Args:
      input: folder of visdial_1.0_SPLIT.json.
      output: folder of the texts.
      split: of VisDial.
      beam, workers: as of `runner.options`.

    Returns:
      {'texts', 'different'}: how many there are, and without doubles.

    Raises:
      UserError: no such file, or a misshapen one.
    """
    found = texts(read(input, split))
    written = collect(found, output, split, beam, workers)
    return {"texts": len(found), "different": len(written)}


def read(folder: str, split: str) -> dict[str, Any]:
    """What stands under "data" in VisDial's file.

    Raises:
      UserError: no such file, or a misshapen one.
    """
    file = Path(folder) / f"visdial_1.0_{split}.json"
    data = layout.get(layout.read_json(file), "data", dict, str(file))
    for name in ("questions", "answers", "dialogs"):
        layout.get(data, name, list, f"{file}: data")
    return data


def texts(data: dict[str, Any]) -> list[str]:
    """Every question and answer that a dialogue uses, and every caption."""
    rounds = [one for talk in data["dialogs"] for one in talk["dialog"]]
    asked = {data["questions"][one["question"]] for one in rounds}
    answered = {data["answers"][one["answer"]] for one in rounds if "answer" in one}
    captions = {talk.get("caption", "") for talk in data["dialogs"]}
    return sorted((asked | answered | captions) - {""})


def collect(
    found: Sequence[str], output: str, split: str, beam: Sequence[str], workers: int
) -> list[str]:
    """The texts without doubles; writes them, too."""
    file = Path(output) / f"{split}_texts.json"
    once = runner.collected(found, transforms.deduplicated, file, beam, workers)
    atomic.write_json(file, dict.fromkeys(sorted(once), ""))
    return sorted(once)
