"""Captions of images and videos: COCO (Karpathy's test split), Flickr30k, AI Challenger, MSR-VTT.

CIDEr-D, BLEU-4 and ROUGE-L over characters, which every language has, and over words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from xllm_jax.core import lookup
from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import CaptionSuite
from xllm_jax.data.example import Example
from xllm_jax.data.text.instructions import instructions
from xllm_jax.evaluation import caption_metrics, scorers
from xllm_jax.evaluation.caption_metrics import Split
from xllm_jax.evaluation.suites import tables
from xllm_jax.evaluation.suites.run import Found, Model, samples
from xllm_jax.report.tables import Table

TITLE = "Captions"
ASKS = True  # a model
METRICS = {"cider": ("CIDEr-D", 1), "bleu4": ("BLEU-4 %", 100), "rouge_l": ("ROUGE-L %", 100)}


def tasks(config: CaptionSuite, model: Model | None = None) -> dict[str, tuple[Example, ...]]:
    """The samples of the sets, each with its instruction.

    Raises:
      UserError: no set is there; no such function that cuts words.
    """
    splitter(config)
    return {
        name: tuple(_asked(example, config.instruction) for example in rows)
        for name, rows in samples(config).items()
    }


def _asked(example: Example, instruction: str) -> Example:
    """With one instruction for all: a prompt would draw another for every sample."""
    known = instruction or example.instruction or (*instructions(example.task), "")[0]
    return dataclasses.replace(example, instruction=known)


def splitter(config: CaptionSuite) -> Split:
    """What cuts a text into words.

    Raises:
      UserError: no such function, or one that makes no list of texts.
    """
    if config.words == "spaces":
        return caption_metrics.spaced_words
    hint = "'spaces', or 'package.module:function' such as jieba:lcut (pip install jieba)"
    if ":" not in config.words:
        raise UserError(f"is {config.words!r}", field="words", hint=hint)
    cut: Callable[[str], object] = lookup.imported(config.words, "words")[1]

    def words(text: str) -> tuple[str, ...]:
        found = cut(text) if callable(cut) else None
        if not isinstance(found, list | tuple) or not all(isinstance(one, str) for one in found):
            raise UserError("gives no list of words", field="words", hint=hint)
        return tuple(filter(None, map(caption_metrics.clean, found)))

    words("a b")
    return words


def scores(
    answers: Sequence[str], examples: Sequence[Example], splits: dict[str, Split]
) -> dict[str, scorers.Score]:
    """{'cider characters', …} of captions, by what is counted."""
    accepted = [scorers.references(example) for example in examples]
    found = {}
    for name, split in splits.items():
        bleu = caption_metrics.bleu_statistics(answers, accepted, split=split)
        alone, ends = caption_metrics.bleu_value(bleu), caption_metrics.bleu_ends(bleu)
        cider = caption_metrics.cider(answers, accepted, split)
        rouge = caption_metrics.rouge_l(answers, accepted, split)
        found[f"cider {name}"] = scorers.average(cider, caption_metrics.MOST)
        found[f"bleu4 {name}"] = scorers.Score(bleu, caption_metrics.bleu_value, ends, alone)
        found[f"rouge_l {name}"] = scorers.average(rouge)
    return found


def report(config: CaptionSuite, found: Found) -> tuple[dict[str, Any], list[Table]]:
    """(results as JSON, tables) of all sets."""
    splits = {"characters": caption_metrics.clean, "words": splitter(config)}

    def score(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, scorers.Score]:
        return scores(answers, examples, splits)

    sets = {
        name: tables.scored(score, one, found.other.get(name)) for name, one in found.sets.items()
    }
    names = {name: config.titles.get(name, name) for name in sets}
    made = [
        tables.of_metric(f"{title} over {split}", f"{metric} {split}", scale, sets, names)
        for split in splits
        for metric, (title, scale) in METRICS.items()
    ]
    return {"words": config.words, "sets": sets}, made
