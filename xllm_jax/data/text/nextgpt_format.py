"""NExT-GPT's own training text, as its released checkpoint saw it (`NExT-GPT-Lagacy/code`).

Turns are tokenized one by one, with `vicuna_v0`'s tokenizer: what a person says is read, what the
model says is learnt, signal tokens included. `PREFIX` and, where there is one, the embedding of the
medium stand before all of it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from xllm_jax.data.text.llm_family import Tokenizer

IGNORED = -100  # a label that does not count
PREFIX = "### Human: "
OPEN, CLOSE = "<Img>", "</Img>"  # around any medium, sound and video too
ASK, END = "\n### Assistant: ", "\n###"
RUNS = {"image": ("IMG", 4), "video": ("VID", 24), "audio": ("AUD", 8)}
"""{modality: (name, number) of its signal tokens}."""

REMOVED = re.compile(r'["()*#:;~]')
SPACES = re.compile(r"\s{2,}")


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one side says.

    Attributes:
      text: its words.
      learnt: the model says it.
    """

    text: str
    learnt: bool


def caption(text: str) -> str:
    """A caption as stage 2 reads and echoes it: lower case, without some signs."""
    return SPACES.sub(" ", REMOVED.sub(" ", text.lower())).rstrip("\n").strip(" ")


def signals(modality: str) -> str:
    """The signal tokens of a modality; '' for text."""
    if modality not in RUNS:
        return ""
    name, count = RUNS[modality]
    return " ".join(f"[{name}{number}]" for number in range(count))


def describe(caption: str, prompt: str) -> list[Turn]:
    """Stage 1: a medium is described."""
    return [Turn(f"{CLOSE} {prompt}{ASK}", False), Turn(f"{caption}{END}", True)]


def draw(caption: str, modality: str) -> list[Turn]:
    """Stage 2: a caption is repeated, and its signal tokens are said."""
    return [Turn(f"{caption}{ASK}", False), Turn(f"{caption}{signals(modality)}{END}", True)]


def conversation(turns: Sequence[Mapping[str, str]]) -> list[Turn]:
    """Stage 3: turns of `conversation` in NExT-GPT's JSON files."""
    made = []
    for number, turn in enumerate(turns):
        text = turn["value"]
        if turn["from"] == "gpt":
            made.append(Turn(f"{text}{signals(turn.get('output_modality', ''))}{END}", True))
            continue
        before = "Human: " if number else ""
        if not number and turn.get("input_modality", "text") != "text":
            before = f"{CLOSE} "
        made.append(Turn(f"{before}{text}{ASK}", False))
    return made


def encode(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """(ids, labels) of turns, one behind the other; labels are not shifted."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        found = tokenizer.encode(turn.text)
        ids += found
        labels += found if turn.learnt else [IGNORED] * len(found)
    return ids, labels


def batch(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows padded behind, then cut.

    Args:
      rows: (ids, labels).
      length: longest row.
      pad: id that pads, `</s>`.

    Returns:
      ids, labels and attention mask, `[B, T]` int32. The mask hides every `</s>`, a real one too.
    """
    widest = min(max(len(ids) for ids, _ in rows), length)

    def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
        cut = [[*row, *[fill] * widest][:widest] for row in rows]
        return np.asarray(cut, np.int32)

    ids = padded([ids for ids, _ in rows], pad)
    labels = padded([labels for _, labels in rows], IGNORED)
    return ids, labels, (ids != pad).astype(np.int32)
