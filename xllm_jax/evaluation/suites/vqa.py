"""Visual questions with short answers, by VQA's accuracy (`evaluation/vqa_accuracy.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import AnswerSuite
from xllm_jax.data.example import Example
from xllm_jax.evaluation import scorers, vqa_accuracy
from xllm_jax.evaluation.suites import tables
from xllm_jax.evaluation.suites.run import Found, Model, samples
from xllm_jax.report.tables import Table

TITLE = "Visual question answering"
ASKS = True  # a model
MARK = "{question}"


def tasks(config: AnswerSuite, model: Model | None = None) -> dict[str, tuple[Example, ...]]:
    """The samples of the sets, each as the prompt asks it.

    Raises:
      UserError: no set is there; a prompt without a place for the question.
    """
    if MARK not in config.prompt:
        raise UserError("has no place for the question", field="prompt", hint=f"Put {MARK} there")
    return {
        name: tuple(_asked(example, config.prompt) for example in rows)
        for name, rows in samples(config).items()
    }


def _asked(example: Example, prompt: str) -> Example:
    question = prompt.replace(MARK, example.instruction)
    return dataclasses.replace(example, instruction=question)


def report(config: AnswerSuite, found: Found) -> tuple[dict[str, Any], list[Table]]:
    """(results as JSON, tables) of all sets."""
    worth = vqa_accuracy.NORMALIZATIONS[config.normalization]

    def score(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, scorers.Score]:
        values = [worth(a, scorers.references(e)) for a, e in zip(answers, examples)]
        return {"accuracy": scorers.average(values)}

    sets = {
        name: tables.scored(score, one, found.other.get(name)) for name, one in found.sets.items()
    }
    names = {name: config.titles.get(name, name) for name in sets}
    made = [tables.of_metric("Accuracy %", "accuracy", 100, sets, names)]
    made += [
        tables.of_groups(f"{names[name]}, by kind", "accuracy", 100, one)
        for name, one in sets.items()
    ]
    return {"normalization": config.normalization, "sets": sets}, made
