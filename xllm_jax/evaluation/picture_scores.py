"""How good drawings are, by features of CLIP: FID, CLIP score, R@1; and the inception score.

All are sums over float64 features. FID's published numbers take Inception's features; here they are
our own CLIP's, so that scores compare with each other and not with those of papers. Each has a
control that says what it is worth: `shuffled` pairs, or noise in place of pictures.

Letters: N pictures or captions, D features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import scipy.special

from xllm_jax.core.errors import UserError

ORDER = 2020  # seed of torch-fidelity's shuffling

Score = Callable[[np.ndarray, np.ndarray], float | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean `[D]` and unbiased covariance `[D, D]` of features, float64."""

    mean: np.ndarray
    covariance: np.ndarray


def statistics(features: np.ndarray) -> Statistics:
    """Of `[N, D]`.

    Raises:
      UserError: fewer than two rows, or numbers that are not finite.
    """
    features = _checked(features)
    if len(features) < 2:
        what = f"{len(features)} pictures have no covariance"
        raise UserError(what, field="features", hint="Give more pictures")
    return Statistics(
        features.mean(0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:])
    )


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Distance between two normal distributions (arXiv 1706.08500): FID of features of pictures.

    Raises:
      UserError: features of different lengths.
    """
    if first.mean.shape != second.mean.shape:
        what = f"have {len(first.mean)} and {len(second.mean)} numbers"
        raise UserError(what, field="features", hint="Take one network for both sets")
    # The root of a product of covariances has the trace of this root, which is of a symmetric
    # matrix: sure even where there are fewer pictures than features.
    values, vectors = np.linalg.eigh(first.covariance)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    between = np.linalg.eigvalsh(root @ second.covariance @ root)
    cross = np.sqrt(np.maximum(between, 0)).sum()
    apart = np.square(first.mean - second.mean).sum()
    return float(apart + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def fid(real: np.ndarray, drawn: np.ndarray) -> float:
    """Fréchet distance of two sets of features, `[N, D]` and `[M, D]`."""
    return frechet_distance(statistics(real), statistics(drawn))


def cosines(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 times the cosine of each picture and its caption, `[N]` float64; both `[N, D]`."""
    return 100 * (_unit(images) * _unit(texts)).sum(-1)


def clip_score(images: np.ndarray, texts: np.ndarray, clamp_rows: bool = False) -> float:
    """Mean of `cosines`, at least 0 (arXiv 2104.08718).

    Args:
      images, texts: `[N, D]`.
      clamp_rows: every pair counts at least 0, as the paper has it, and not their mean alone.
    """
    found = cosines(images, texts)
    return float(np.maximum(found, 0).mean() if clamp_rows else max(found.mean(), 0.0))


def clip_similarity(frames: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 times the mean cosine of a clip's frames and its caption, `[N]`; frames `[N, F, D]`."""
    return cosines(frames, texts[:, None]).mean(-1)


def inception_score(
    logits: np.ndarray, splits: int = 10, shuffle: bool = False
) -> tuple[float, float]:
    """Inception score (arXiv 1606.03498) of class logits `[N, classes]`: mean and deviation.

    Args:
      logits: of any classifier.
      splits: parts that are scored one by one.
      shuffle: rows first change their order, always in the same way.
    """
    logits = _checked(logits)
    if not 0 < splits <= len(logits):
        what = f"{splits} parts of {len(logits)} pictures"
        raise UserError(what, field="splits", hint="Take fewer parts")
    if shuffle:
        logits = logits[np.random.RandomState(ORDER).permutation(len(logits))]
    logs = scipy.special.log_softmax(logits, axis=1)
    edges = [part * len(logits) // splits for part in range(splits + 1)]
    scores = []
    for start, stop in itertools.pairwise(edges):
        own = logs[start:stop]
        shares = np.exp(own)
        scores.append(np.exp((shares * (own - np.log(shares.mean(0)))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def recall_at_1(made: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether each row is nearer to its own target than to any other, `[N]` bool.

    Args:
      made: `[N, ...]`, such as projected embeddings `[N, tokens, width]`.
      wanted: of the same shape, such as the text encoder's. The mean over all is taken off both,
        since padding is alike in all captions.
    """
    made, wanted = (_checked(x.reshape(len(x), -1)) for x in (made, wanted))
    center = wanted.mean(0)
    near = _unit(made - center) @ _unit(wanted - center).T
    own = np.diagonal(near)
    return (near < own[:, None]).sum(1) == len(near) - 1


def shuffled(values: np.ndarray) -> np.ndarray:
    """The control of everything in pairs: each row has its neighbor's partner."""
    return np.roll(values, 1, axis=0)


def _unit(x: np.ndarray) -> np.ndarray:
    x = _checked(x)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _checked(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if not np.isfinite(x).all():
        raise UserError("are not all finite", field="features", hint="Look at the network's output")
    return x
