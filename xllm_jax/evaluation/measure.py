"""Evaluation: a task's answers scored, beside the answers of somebody who could not see or hear.

Every claim is a distance to its controls. Blind: the same prompt without the media. Shuffled: the
same prompt with another sample's media. Chance: the best constant answer.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from xllm_jax.data.example import Example
from xllm_jax.evaluation import bootstrap, scorers

Answer = Callable[[Sequence[Example]], list[str]]

SHOWN = 12  # samples that a report shows of each task
GROUPED = 5  # fewer samples of a tag make no group


@dataclasses.dataclass(frozen=True)
class Task:
    """What is asked, and how answers are scored.

    Attributes:
      name: short name in the report's data.
      title: for people.
      examples: of the held-out split.
      scorer: a function of `scores`.
    """

    name: str
    title: str
    examples: tuple[Example, ...]
    scorer: scorers.Scorer


def blind(examples: Sequence[Example]) -> list[Example]:
    """The same prompts without any media."""
    return [dataclasses.replace(example, media=()) for example in examples]


def shuffled(
    examples: Sequence[Example], only: Sequence[str] = (), seed: int = 0
) -> list[Example] | None:
    """Every example with another example's media, the same number of each modality.

    Args:
      examples: of one task.
      only: modalities that are exchanged; all by default.
      seed: of the exchange.

    Returns:
      None where all examples of a form share the same files, so that nothing can be exchanged.
    """
    forms: dict[tuple[str, ...], dict[tuple, None]] = {}
    for example in examples:
        forms.setdefault(_form(example), {})[_files(example, only)] = None
    other: dict[tuple, dict[tuple, tuple]] = {}
    for form, files in forms.items():
        if len(files) < 2:
            return None
        order = [list(files)[i] for i in np.random.default_rng(seed).permutation(len(files))]
        other[form] = dict(zip(order, order[1:] + order[:1]))
    return [_exchange(example, other[_form(example)], only) for example in examples]


def _form(example: Example) -> tuple[str, ...]:
    return tuple(modality for modality, _ in example.media)


def _files(example: Example, only: Sequence[str]) -> tuple[str, ...]:
    return tuple(path for modality, path in example.media if not only or modality in only)


def _exchange(example: Example, other: dict[tuple, tuple], only: Sequence[str]) -> Example:
    files = iter(other[_files(example, only)])
    media = tuple(
        (modality, next(files) if not only or modality in only else path)
        for modality, path in example.media
    )
    return dataclasses.replace(example, media=media)


def measure(task: Task, answer: Answer, controls: bool = False) -> dict[str, Any]:
    """Answers a task and scores it.

    Args:
      task: the task.
      answer: examples to answers, in order; sees prompts and media only.
      controls: also answer blind and with other samples' media.

    Returns:
      JSON: 'title', 'samples' (number), 'seconds', 'metrics' {name: see `metric`}, 'shown' (some
      samples with their answers), 'keys' of all samples.
    """
    examples, began = task.examples, time.monotonic()
    answers = answer(examples)
    scored = task.scorer(answers, examples)
    asides = {"chance": scorers.best_constant(task.scorer, examples)}
    if controls:
        asides["blind"] = answer(blind(examples))
        others = shuffled(examples)
        if others is not None:
            asides["shuffled"] = answer(others)
    compared = {name: task.scorer(texts, examples) for name, texts in asides.items()}
    return {
        "title": task.title,
        "samples": len(examples),
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {
            name: metric(score, {aside: other[name] for aside, other in compared.items()}, examples)
            for name, score in scored.items()
        },
        "shown": show(task, answers, scored),
        "keys": [example.key for example in examples],
    }


def metric(
    score: scorers.Score, asides: Mapping[str, scorers.Score], examples: Sequence[Example]
) -> dict[str, Any]:
    """One metric as JSON: value, low, high, samples, higher, controls, groups, scores, margin.

    There is no margin over controls that have no value, nor without one of the answers.

    Args:
      score: of the answers.
      asides: {control: its score}.
      examples: that were answered, in order.
    """
    found = plain(score.estimate()) | {
        "higher": score.higher,
        **{name: plain(aside.estimate()) for name, aside in asides.items()},
        "groups": {
            tag: plain(score.estimate(members)) for tag, members in groups(examples).items()
        },
        "scores": [round(float(value), 4) for value in score.samples],
    }
    known = {name: found[name]["value"] for name in asides if found[name]["value"] is not None}
    if (
        found["value"] is not None and len(known) > 1
    ):  # without the answers of the blind, a margin would promise too much
        sign = 1 if score.higher else -1
        best = max(known, key=lambda name: sign * known[name])
        found["margin"] = difference(asides[best], score) | {"over": best}
    return found


def difference(first: scorers.Score, second: scorers.Score) -> dict[str, Any]:
    """How much better the second is on the same samples, as JSON with its interval.

    Positive is better, also for error rates.
    """
    sign = 1.0 if second.higher else -1.0
    width = max(first.scale[1], second.scale[1]) - min(first.scale[0], second.scale[0])
    if first.is_mean and second.is_mean:
        found = bootstrap.mean_difference(sign * first.samples, sign * second.samples)
        return plain(scorers.within(found, (-width, width)))
    size = first.sums.shape[1]
    worst, best = (0, 1) if second.higher else (1, 0)
    ends = [
        np.concatenate([first.ends[best], second.ends[worst]]),
        np.concatenate([first.ends[worst], second.ends[best]]),
    ]

    def value(sums: np.ndarray) -> np.ndarray:
        return sign * (second.value(sums[..., size:]) - first.value(sums[..., :size]))

    pairs = np.concatenate([first.sums, second.sums], axis=1)
    found = bootstrap.estimate(pairs, value, ends=np.array(ends))
    return plain(scorers.within(found, (-width, width)))


def compare(first: dict[str, Any], second: dict[str, Any], metric: str) -> dict[str, Any] | None:
    """How much better the second of two measured tasks is, sample by sample; None if they differ
    or there is nothing to score.

    Works on what `measure` returned. Each sample's own score is averaged, so a corpus error rate
    becomes the mean of the utterances' rates.
    """
    if first["keys"] != second["keys"] or metric not in first["metrics"]:
        return None
    both = first["metrics"][metric], second["metrics"][metric]
    if any(one["value"] is None for one in both):
        return None
    before, after = (np.asarray(one["scores"]) for one in both)
    sign = 1.0 if first["metrics"][metric]["higher"] else -1.0
    return plain(bootstrap.mean_difference(sign * before, sign * after))


def groups(examples: Sequence[Example]) -> dict[str, list[int]]:
    """Numbers of the examples with each tag; 'seen' are those without any unseen_… tag."""
    found: dict[str, list[int]] = {}
    for number, example in enumerate(examples):
        new = [tag for tag in example.tags if tag.startswith("unseen")]
        for tag in dict.fromkeys([*example.tags, *([] if new else ["seen"])]):
            found.setdefault(tag, []).append(number)
    kept = {tag: members for tag, members in found.items() if len(members) >= GROUPED}
    return dict(sorted(kept.items()))


def show(
    task: Task, answers: Sequence[str], scored: dict[str, scorers.Score]
) -> list[dict[str, Any]]:
    """Samples spread over the task: files, question, answer, reference, how good it was."""
    main = next(iter(scored.values()))
    step = max(1, len(answers) // SHOWN)
    return [
        {
            "key": example.key,
            "media": [list(pair) for pair in example.media],
            "question": example.instruction,
            "said": example.transcript if any(m == "speech" for m, _ in example.media) else "",
            "answer": answers[number],
            "reference": scorers.reference(example) if not main.higher else example.answer,
            "scores": {
                name: round(float(score.samples[number]), 4) for name, score in scored.items()
            },
            "right": _right(scored, number),
            "tags": list(example.tags),
        }
        for number, example in list(enumerate(task.examples))[::step][:SHOWN]
    ]


def _right(scored: dict[str, scorers.Score], number: int) -> bool | None:
    """Whether a sample is wholly right, by the first metric that can tell; else None."""
    for name, score in scored.items():
        if name in ("accuracy", "objects"):
            return bool(score.samples[number] == 1)
        if name == "cer":
            return bool(score.samples[number] == 0)
    return None


def plain(estimate: bootstrap.Estimate) -> dict[str, Any]:
    """An estimate as JSON, which has no NaN: None where there is nothing to score."""
    found = estimate._asdict().items()
    return {name: None if math.isnan(value) else round(value, 6) for name, value in found}
