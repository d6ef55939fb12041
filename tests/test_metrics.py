"""Caption scores, answers and confidence intervals against independent rewrites and by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import bootstrap, caption_metrics

LETTERS = list("红绿蓝圆方左右有一个")


def random_corpus(seed: int, samples: int = 7):
    """Hypotheses and one to three references each, as random strings of few characters."""
    rng = np.random.default_rng(seed)

    def text(low: int, high: int) -> str:
        return "".join(rng.choice(LETTERS, rng.integers(low, high)))

    references = [[text(1, 14) for _ in range(rng.integers(1, 4))] for _ in range(samples)]
    hypotheses = [text(0, 14) for _ in range(samples)]
    references[0].append(text(6, 14))
    hypotheses[0] = references[0][-1]
    return hypotheses, references


def dense_cider(hypotheses, references):
    """CIDEr-D once more, with dense vectors over every possible run of the corpus."""
    scores = np.zeros(len(hypotheses))
    for order in (1, 2, 3, 4):
        texts = [*hypotheses, *itertools.chain(*references)]
        runs = sorted({t[i : i + order] for t in texts for i in range(len(t) - order + 1)})

        def vector(text, runs=runs, order=order):
            starts = range(len(text) - order + 1)
            return np.array(
                [sum(text[i : i + order] == run for i in starts) for run in runs], float
            )

        has = np.array([np.any([vector(r) > 0 for r in rs], axis=0) for rs in references])
        weight = np.log(len(references)) - np.log(np.maximum(1, has.sum(axis=0)))
        for i, (text, accepted) in enumerate(zip(hypotheses, references)):
            for reference in accepted:
                first, second = vector(text) * weight, vector(reference) * weight
                norm = np.linalg.norm(first) * np.linalg.norm(second)
                cosine = np.minimum(first, second) @ second / norm if norm else 0.0
                penalty = np.exp(-((len(text) - len(reference)) ** 2) / 72.0)
                scores[i] += 10 * cosine * penalty / len(accepted) / 4
    return scores


@pytest.mark.parametrize("seed", range(4))
def test_cider_equals_a_dense_rewrite(seed):
    hypotheses, references = random_corpus(seed)
    found = caption_metrics.cider(hypotheses, references)
    np.testing.assert_allclose(found, dense_cider(hypotheses, references), rtol=1e-12, atol=1e-12)
    assert found.max() > 0


def test_cider_of_a_copied_only_reference_is_ten():
    references = [["红色圆形在左边"], ["蓝色方形在右边"], ["一个绿色星形"]]
    found = caption_metrics.cider([row[0] for row in references], references)
    np.testing.assert_allclose(found, 10.0, rtol=1e-12)
    assert caption_metrics.cider(["。", "蓝色方形在右边", ""], references)[[0, 2]].tolist() == [
        0,
        0,
    ]


def test_cider_ignores_runs_that_every_sample_has():
    # 图 is in all references: a caption that says nothing else is worth nothing.
    assert caption_metrics.cider(["图", "图"], [["图红"], ["图蓝"]]).tolist() == [0, 0]


def bleu(hypotheses, references):
    """BLEU of a corpus from the sums of its samples, as the scorers compute it."""
    sums = caption_metrics.bleu_statistics(hypotheses, references).sum(axis=0)
    return float(caption_metrics.bleu_value(sums))


def bleu_by_hand(hypotheses, references):
    """Corpus BLEU-4 with lists instead of counters."""
    matched, total = [0] * 4, [0] * 4
    length = wanted = 0
    for text, accepted in zip(hypotheses, references):
        length += len(text)
        wanted += sorted((abs(len(r) - len(text)), len(r)) for r in accepted)[0][1]
        for order in range(4):
            runs = [text[i : i + order + 1] for i in range(len(text) - order)]
            total[order] += len(runs)
            for run in set(runs):
                inside = [
                    sum(r[i : i + order + 1] == run for i in range(len(r) - order))
                    for r in accepted
                ]
                matched[order] += min(runs.count(run), max(inside))
    if min(matched) == 0:
        return 0.0
    penalty = 1.0 if length > wanted else np.exp(1 - wanted / length)
    return penalty * np.prod([m / t for m, t in zip(matched, total)]) ** 0.25


@pytest.mark.parametrize("seed", range(4))
def test_bleu_equals_a_rewrite(seed):
    hypotheses, references = random_corpus(seed, samples=20)
    found = bleu(hypotheses, references)
    assert found == pytest.approx(bleu_by_hand(hypotheses, references), rel=1e-12)
    assert found > 0


def test_bleu_of_published_example():
    # Papineni et al., section 2.1: seven times the same word, two of which a reference has.
    sums = caption_metrics.bleu_statistics(
        ["的的的的的的的"], [["的猫在的毯子上", "有一只猫在毯子上"]]
    )
    assert sums[0, 0] == 2 and sums[0, 4] == 7
    # One missing character of five: precisions are 1, only brevity counts.
    assert bleu(["一二三四"], [["一二三四五"]]) == pytest.approx(np.exp(1 - 5 / 4))
    assert bleu(["一二三"], [["一二三"]]) == 0.0  # no run of four


@pytest.mark.parametrize(
    ("hypothesis", "reference", "right"),
    [
        ("大的。", "大的", True),
        ("大", "大的", True),
        (" 红 色 ", "红色", True),
        ("红色", "蓝色", False),
        ("不是", "是", False),
        ("", "是", False),
    ],
)
def test_answers(hypothesis, reference, right):
    assert caption_metrics.same_answer(hypothesis, reference) is right


def test_unequal_numbers_are_refused():
    with pytest.raises(UserError, match="2 captions"):
        caption_metrics.cider(["a", "b"], [["a"]])
    with pytest.raises(UserError, match="no reference"):
        bleu(["a"], [[]])


def test_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).random(400) < 0.3
    found = bootstrap.mean(values)
    error = 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert found.value == values.mean() and found.samples == 400
    assert found.low == pytest.approx(found.value - error, abs=0.006)
    assert found.high == pytest.approx(found.value + error, abs=0.006)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        found = bootstrap.mean(rng.random(100) < 0.4, seed=trial, resamples=400)
        hits += found.low <= 0.4 <= found.high
    assert 0.89 <= hits / 200 <= 0.99


def test_rate_weighs_samples_by_their_length():
    errors, lengths = np.array([1, 0, 5]), np.array([10, 10, 5])
    found = bootstrap.ratio(errors, lengths)
    assert found.value == 6 / 25
    assert 0 <= found.low < 6 / 25 < found.high <= 1


def test_interval_of_a_rate_is_that_of_its_linearization():
    rng = np.random.default_rng(4)
    lengths = rng.integers(5, 15, 800)
    errors = rng.binomial(lengths, 0.2)
    found = bootstrap.ratio(errors, lengths)
    left = errors - found.value * lengths
    error = 1.96 * left.std(ddof=1) / lengths.mean() / np.sqrt(800)
    assert found.low == pytest.approx(found.value - error, abs=0.08 * error)
    assert found.high == pytest.approx(found.value + error, abs=0.08 * error)


def test_paired_difference_is_narrower_than_two_intervals():
    rng = np.random.default_rng(2)
    hard = rng.random(300)
    first, second = hard < 0.5, hard < 0.6  # the same samples are easy for both
    found = bootstrap.mean_difference(first, second)
    assert found.value == pytest.approx(second.mean() - first.mean())
    single = bootstrap.mean(first)
    assert found.high - found.low < single.high - single.low


def test_same_seed_same_interval():
    values = np.arange(30.0)
    assert bootstrap.mean(values, seed=3) == bootstrap.mean(values, seed=3)
    assert bootstrap.mean(values, seed=3) != bootstrap.mean(values, seed=4)
