"""What an answer is worth: one function per kind of task, sample by sample.

Each scorer takes the answers and the examples and returns {metric: Score}. A score keeps what every
sample adds to it, so that intervals, groups and paired differences need no further pass.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from xllm_jax.data.example import Example
from xllm_jax.data.synthetic_world import language
from xllm_jax.evaluation import bootstrap, caption_metrics, error_rate, transcript_forms


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric of one set of answers.

    Attributes:
      sums: `[N, K]` float64, what each sample adds.
      value: sums `[..., K]` of n samples to scores `[...]`; see `bootstrap.estimate`.
      ends: `[2, K]`, what a sample at the low and at the high end of the metric's scale adds.
      samples: `[N]` float64, the score of each sample alone, for showing and paired differences.
      higher: whether more is better.
    """

    sums: np.ndarray
    value: bootstrap.Value
    ends: np.ndarray
    samples: np.ndarray
    higher: bool = True

    def estimate(self, chosen: Sequence[int] | None = None) -> bootstrap.Estimate:
        """The score with its interval, of all samples or of the chosen ones."""
        sums = self.sums if chosen is None else self.sums[list(chosen)]
        return within(bootstrap.estimate(sums, self.value, ends=self.ends), self.scale)

    @property
    def is_mean(self) -> bool:
        """Whether the score is the mean of the samples' own scores."""
        return self.value is bootstrap.rate and bool((self.sums[:, 1] == 1).all())

    @property
    def scale(self) -> tuple[float, float]:
        """The lowest and the highest score that there can be, or that a sample has."""
        ends = [float(self.value(end)) for end in self.ends]
        return min([ends[0], *self.samples]), max([ends[1], *self.samples])


def within(found: bootstrap.Estimate, scale: tuple[float, float]) -> bootstrap.Estimate:
    """The estimate with an interval that does not leave the scale."""
    return found._replace(low=max(found.low, scale[0]), high=min(found.high, scale[1]))


Scorer = Callable[[Sequence[str], Sequence[Example]], dict[str, Score]]


def average(values: Sequence[float] | np.ndarray, most: float = 1.0) -> Score:
    """A metric that is the mean of its samples, each between 0 and `most`."""
    alone = np.asarray(values, np.float64)
    sums = np.stack([alone, np.ones_like(alone)], axis=1)
    return Score(sums, bootstrap.rate, np.array([[0.0, 1.0], [most, 1.0]]), alone)


def transcription(
    answers: Sequence[str], examples: Sequence[Example], form: str = "normalized"
) -> dict[str, Score]:
    """Character error rate of the corpus.

    Args:
      answers: what was heard.
      examples: what was said.
      form: in which form both are compared, see `transcript_forms.form`.
    """
    bring = transcript_forms.form(form)
    pairs = [bring(reference(e), a) for a, e in zip(answers, examples)]
    counts = [(error_rate.edit_distance(said, heard), len(said)) for said, heard in pairs]
    sums = np.asarray(counts, np.float64).reshape(-1, 2)
    alone = sums[:, 0] / np.maximum(sums[:, 1], 1)
    ends = bootstrap.rate_ends(sums)
    return {"cer": Score(sums, bootstrap.rate, ends, alone, higher=False)}


def short_answer(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Score]:
    """Share of right answers."""
    right = [caption_metrics.same_answer(a, e.answer) for a, e in zip(answers, examples)]
    return {"accuracy": average(right)}


def caption(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Score]:
    """CIDEr, BLEU-4, and how well the named objects are those of the picture (F1)."""
    accepted = [references(example) for example in examples]
    bleu = caption_metrics.bleu_statistics(answers, accepted)
    alone = caption_metrics.bleu_value(bleu)
    found = {
        "cider": average(caption_metrics.cider(answers, accepted), caption_metrics.MOST),
        "bleu4": Score(bleu, caption_metrics.bleu_value, caption_metrics.bleu_ends(bleu), alone),
    }
    true = [language.parse_objects(texts[0]) for texts in accepted]
    if any(true):
        claimed = [language.parse_objects(answer) for answer in answers]
        found["objects"] = average([_agreement(a, b) for a, b in zip(claimed, true)])
    return found


def _agreement(claimed: frozenset, true: frozenset) -> float:
    """F1 of two sets; 1 when both are empty."""
    total = len(claimed) + len(true)
    return 2 * len(claimed & true) / total if total else 1.0


def video_caption(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, Score]:
    """Share of captions with the right object (color and shape) and the right motion; CIDEr."""
    accepted = [references(example) for example in examples]
    found = {"cider": average(caption_metrics.cider(answers, accepted), caption_metrics.MOST)}
    true = [language.parse_motion(texts[0]) for texts in accepted]
    if any(true):
        claimed = [language.parse_motion(answer) for answer in answers]
        right = [a is not None and a == b for a, b in zip(claimed, true)]
        found = {"accuracy": average(right), **found}
    return found


def reference(example: Example) -> str:
    """What was really said."""
    return example.transcript or example.answer


def references(example: Example) -> tuple[str, ...]:
    """Every acceptable caption."""
    return example.references or (example.answer,)


def best_constant(scorer: Scorer, examples: Sequence[Example]) -> list[str]:
    """The answers of somebody who never looks but knows how often each answer is right.

    For short answers that is the most frequent answer to each kind of question (an example's first
    tag), for everything else the most frequent reference.
    """

    def kind(example: Example) -> str:
        return example.tags[0] if scorer is short_answer and example.tags else ""

    counts: dict[str, Counter[str]] = {}
    for example in examples:
        text = example.answer if scorer is short_answer else references(example)[0]
        counts.setdefault(kind(example), Counter())[text] += 1
    return [counts[kind(example)].most_common(1)[0][0] for example in examples]
