"""Scores of Chinese captions and short answers, with characters as words.

CIDEr-D: Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation" (2015), section 5.
BLEU: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (2002).
Every score sees text without spaces, punctuation and letter case.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import error_rate

ORDERS = (1, 2, 3, 4)
MOST = 10.0  # CIDEr-D of a caption that is its reference
SIGMA = 6.0  # width of CIDEr-D's penalty on a difference in length

Vector = dict[str, float]


def clean(text: str) -> str:
    """The characters that scores compare: no spaces, punctuation or letter case."""
    return error_rate.normalized(text, "")[0]


def same_answer(hypothesis: str, reference: str) -> bool:
    """Whether a short answer is right, whatever its punctuation, spaces and 的."""
    return _answer(hypothesis) == _answer(reference)


def _answer(text: str) -> str:
    return clean(text).replace("的", "")


def ngrams(text: str, order: int) -> Counter[str]:
    """How often each run of `order` characters occurs."""
    return Counter(text[start : start + order] for start in range(len(text) - order + 1))


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of every sample, `[N]` float64 between 0 and 10; the corpus score is their mean.

    Rare runs of characters weigh more: a run's weight is the logarithm of the number of samples
    over the number of samples with a reference that has it, so one sample alone scores 0.

    Args:
      hypotheses: N captions.
      references: N lists of acceptable captions.

    Raises:
      UserError: different numbers, or a sample without reference.
    """
    _check(hypotheses, references)
    hypotheses = [clean(text) for text in hypotheses]
    references = [[clean(text) for text in texts] for texts in references]
    total = np.zeros(len(hypotheses))
    unseen = math.log(len(references)) if references else 0.0  # weight of a run in no reference
    for order in ORDERS:
        weights = document_weights(references, order)
        for sample, (text, accepted) in enumerate(zip(hypotheses, references)):
            scores = [_similarity(text, one, order, weights, unseen) for one in accepted]
            total[sample] += sum(scores) / len(scores)
    return MOST * total / len(ORDERS)


def document_weights(references: Sequence[Sequence[str]], order: int) -> Vector:
    """Logarithm of (samples / samples whose references hold the run), of every run."""
    seen: Counter[str] = Counter()
    for accepted in references:
        seen.update(set().union(*(ngrams(text, order) for text in accepted)))
    return {run: math.log(len(references) / count) for run, count in seen.items()}


def _similarity(text: str, reference: str, order: int, weights: Vector, unseen: float) -> float:
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
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], order: int = 4
) -> np.ndarray:
    """What each sample adds to corpus BLEU.

    Returns:
      `[N, 2 * order + 2]` float64: matched runs of each order (clipped by the reference that has
      the run most often), runs of each order, length, length of the reference nearest in length
      (the shorter one of two equally near).

    Raises:
      UserError: different numbers, or a sample without reference.
    """
    _check(hypotheses, references)
    rows = []
    for text, accepted in zip(map(clean, hypotheses), references):
        accepted = [clean(reference) for reference in accepted]
        matched, total = [], []
        for size in range(1, order + 1):
            own = ngrams(text, size)
            most: Counter[str] = Counter()
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


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(hypotheses) != len(references):
        raise UserError(f"{len(hypotheses)} captions, but references of {len(references)} samples")
    if not all(references):
        raise UserError("a sample has no reference", hint="Leave it out")
