"""Scores of captions and short answers, over characters or over words.

CIDEr-D: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (2015), section 5.
BLEU: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (2002).
ROUGE-L: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3.
What is counted a `Split` says. By default it is characters, as Chinese is written: scores then see
text without spaces, punctuation and letter case.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import error_rate

ORDERS = (1, 2, 3, 4)
MOST = 10.0  # CIDEr-D of a caption that is its reference
SIGMA = 6.0  # width of CIDEr-D's penalty on a difference in length

BETA = 1.2  # how much more ROUGE-L looks at recall than at precision, as COCO's evaluation has it

Units = str | tuple[str, ...]  # characters, or words
Split = Callable[[str], Units]
Vector = dict[Units, float]


def clean(text: str) -> str:
    """The characters that scores compare: no spaces, punctuation or letter case."""
    return error_rate.normalized(text, "")[0]


def spaced_words(text: str) -> tuple[str, ...]:
    """Words with spaces between them, without letter case and what is no letter or number in them:
    don't is dont."""
    return tuple(filter(None, map(clean, text.split())))


def same_answer(hypothesis: str, reference: str) -> bool:
    """Whether a short answer is right, whatever its punctuation, spaces and 的."""
    return short(hypothesis) == short(reference)


def short(text: str) -> str:
    """A short answer as it is compared: `clean`, and without 的."""
    return clean(text).replace("的", "")


def ngrams(text: Units, order: int) -> Counter[Units]:
    """How often each run of `order` characters or words occurs."""
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def cider(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], split: Split = clean
) -> np.ndarray:
    """CIDEr-D of every sample, `[N]` float64 between 0 and 10; the corpus score is their mean.

    Rare runs of characters weigh more: a run's weight is the logarithm of the number of samples
    over the number of samples with a reference that has it, so one sample alone scores 0.

    Args:
      hypotheses: N captions.
      references: N lists of acceptable captions.
      split: what is counted.

    Raises:
      UserError: different numbers, or a sample without reference.
    """
    _check(hypotheses, references)
    made = [split(text) for text in hypotheses]
    wanted = [[split(text) for text in texts] for texts in references]
    total = np.zeros(len(made))
    unseen = math.log(len(wanted)) if wanted else 0.0  # weight of a run in no reference
    for order in ORDERS:
        weights = document_weights(wanted, order)
        for sample, (text, accepted) in enumerate(zip(made, wanted)):
            scores = [_similarity(text, one, order, weights, unseen) for one in accepted]
            total[sample] += sum(scores) / len(scores)
    return MOST * total / len(ORDERS)


def document_weights(references: Sequence[Sequence[Units]], order: int) -> Vector:
    """Logarithm of (samples / samples whose references hold the run), of every run."""
    seen: Counter[Units] = Counter()
    for accepted in references:
        seen.update(set().union(*(ngrams(text, order) for text in accepted)))
    return {run: math.log(len(references) / count) for run, count in seen.items()}


def _similarity(text: Units, reference: Units, order: int, weights: Vector, unseen: float) -> float:
    """Clipped cosine of two weighted run counts, times the penalty on the length difference."""
    first = {run: n * weights.get(run, unseen) for run, n in ngrams(text, order).items()}
    second = {run: n * weights[run] for run, n in ngrams(reference, order).items()}
    norms = _norm(first) * _norm(second)
    if not norms:
        return 0.0
    shared = sum(min(first.get(run, 0.0), value) * value for run, value in second.items())
    return shared / norms * math.exp(-((len(text) - len(reference)) ** 2) / (2 * SIGMA**2))


def _norm(vector: Vector) -> float:
    return math.sqrt(sum(value * value for value in vector.values()))


def bleu_statistics(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    order: int = 4,
    split: Split = clean,
) -> np.ndarray:
    """What each sample adds to corpus BLEU; arguments as of `cider`.

    Returns:
      `[N, 2 * order + 2]` float64: matched runs of each order (clipped by the reference that has
      the run most often), runs of each order, length, length of the reference nearest in length
      (the shorter one of two equally near).

    Raises:
      UserError: different numbers, or a sample without reference.
    """
    _check(hypotheses, references)
    rows = []
    for text, texts in zip(map(split, hypotheses), references):
        accepted = [split(reference) for reference in texts]
        matched, total = [], []
        for size in range(1, order + 1):
            own = ngrams(text, size)
            most: Counter[Units] = Counter()
            for reference in accepted:
                most |= ngrams(reference, size)
            matched.append(sum((own & most).values()))
            total.append(sum(own.values()))
        nearest = min(map(len, accepted), key=lambda length: (abs(length - len(text)), length))
        rows.append([*matched, *total, len(text), nearest])
    return np.asarray(rows, np.float64).reshape(-1, 2 * order + 2)


def bleu_value(sums: np.ndarray) -> np.ndarray:
    """BLEU between 0 and 1 from summed `bleu_statistics`, `[..., 2 * order + 2]` to `[...]`.

    No smoothing: a corpus without any matched run of some order scores 0.
    """
    sums = np.asarray(sums, np.float64)
    order = (sums.shape[-1] - 2) // 2
    matched, total = sums[..., :order], sums[..., order : 2 * order]
    length, wanted = sums[..., -2], sums[..., -1]
    precision = matched / np.maximum(total, 1.0)
    found = (precision > 0).all(axis=-1)
    logs = np.log(np.where(precision > 0, precision, 1.0)).mean(axis=-1)
    brevity = np.minimum(0.0, 1.0 - wanted / np.maximum(length, 1.0))
    return np.where(found, np.exp(logs + brevity), 0.0)


def bleu_ends(statistics: np.ndarray) -> np.ndarray:
    """`bleu_statistics` of a caption of mean length, no run matched and every one: `[2, K]`."""
    order = (statistics.shape[1] - 2) // 2
    typical = statistics.sum(axis=0) / max(len(statistics), 1)
    wanted = typical[-1]
    total = np.maximum(wanted - np.arange(order), 1.0)
    wrong, right = ([*total * share, *total, wanted, wanted] for share in (0.0, 1.0))
    return np.array([wrong, right])


def rouge_l(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], split: Split = clean
) -> np.ndarray:
    """ROUGE-L of every sample, `[N]` float64 between 0 and 1; the corpus score is their mean.

    As COCO's caption evaluation has it: the best precision and the best recall over the references,
    each of the longest common subsequence, with `BETA`.

    Args:
      hypotheses, references, split: as of `cider`.

    Raises:
      UserError: different numbers, or a sample without reference.
    """
    _check(hypotheses, references)
    scores = []
    for text, texts in zip(map(split, hypotheses), references):
        accepted = [split(reference) for reference in texts]
        common = [_common(text, reference) for reference in accepted]
        precision = max(common) / max(len(text), 1)
        recall = max(one / max(len(whole), 1) for one, whole in zip(common, accepted))
        below = recall + BETA**2 * precision
        scores.append((1 + BETA**2) * precision * recall / below if below else 0.0)
    return np.asarray(scores, np.float64)


def _common(first: Units, second: Units) -> int:
    """Length of the longest common subsequence."""
    row = np.zeros(len(second) + 1, np.int64)
    for item in first:
        same = np.fromiter((item == other for other in second), np.int64, len(second))
        row[1:] = np.maximum.accumulate(np.maximum(row[1:], row[:-1] + same))
    return int(row[-1])


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} captions, but references of {len(references)} samples")
    if not all(references):
        raise UserError("a sample has no reference", hint="Leave it out")
