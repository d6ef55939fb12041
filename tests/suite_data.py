"""Small test sets in published layouts, and models that answer from a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import reader_fixtures as fixtures

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.core.suite import SpeechSuite
from xllm_jax.data.example import Example
from xllm_jax.evaluation.suites.run import Model

LETTERS = "红色的圆在左边有几个物体蓝绿方块"


def sentence(number: int) -> str:
    """A sentence of 3 to 13 characters."""
    return "".join(LETTERS[(number * 7 + i * i) % len(LETTERS)] for i in range(3 + number % 11))


def speech(root: Path, utterances: int, speakers: int = 3) -> SpeechSuite:
    """An AISHELL-2 test set of silent names: its sounds are never read."""
    names = [(f"S{n % speakers}", f"U{n:04d}", sentence(n)) for n in range(utterances)]
    fixtures.write(
        root / "ios/test/trans.txt", "\n".join(f"{name}\t{text}" for _, name, text in names)
    )
    fixtures.write(
        root / "ios/test/wav.scp", "\n".join(f"{n}\twav/{who}/{n}.wav" for who, n, _ in names)
    )
    return speech_config(root)


def speech_config(root: Path) -> SpeechSuite:
    """The suite of the set that `speech` has written."""
    return SpeechSuite(
        root=str(root),
        sets={"test_ios": Source("aishell", "ios", "test")},
        titles={"test_ios": "AISHELL-2 test-ios (S)"},
        speakers={"test_ios": r"([^/]+)/[^/]+$"},
        shard=4,
    )


def misheard(example: Example) -> str:
    """The sentence with a character replaced, left out or added, by its length."""
    said = example.answer
    return {0: "零" + said[1:], 1: said[1:], 2: said + "零", 3: said}[len(said) % 4]


def model(
    answer: Callable[[Example], str], name: str = "table", asked: list[str] | None = None
) -> Model:
    """A model that answers sample by sample; samples whose answer is None cannot be read.

    Args:
      answer: to one sample; 'unreadable' stands for a file that is broken.
      name: of the model.
      asked: gets the keys of what was asked.
    """

    def answers(examples: Sequence[Example]) -> list[str]:
        said = [answer(example) for example in examples]
        for example, text in zip(examples, said):
            if text == "unreadable":
                raise UserError("cannot be read", field=example.key)
        if asked is not None:
            asked.extend(example.key for example in examples)
        return said

    return Model(name, {"model": name}, lambda: answers)


def results(folder: Path) -> dict:
    """What a suite has written."""
    return json.loads((folder / "results.json").read_text("utf-8"))
