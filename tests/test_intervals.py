"""Confidence intervals hold the truth as often as they say, from ten samples on."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from xllm_jax.data.example import Example
from xllm_jax.evaluation import bootstrap, measure, scorers

TRIALS, LEAST = 800, 0.93
SIZES = (10, 40)


def coverage(draw, truth, estimate) -> float:
    """Share of drawn test sets whose interval holds the truth."""
    rng = np.random.default_rng(0)
    found = [estimate(*draw(rng)) for _ in range(TRIALS)]
    assert all(one.low <= one.value <= one.high for one in found)
    return np.mean([one.low - 1e-12 <= truth <= one.high + 1e-12 for one in found])


def quick(function):
    return lambda *given: function(*given, resamples=300)


@pytest.mark.parametrize("count", [10, 30, 75])
def test_shares_from_2_to_98_percent(count):
    """Every outcome by its probability, nothing drawn."""
    values = [(np.arange(count) < right).astype(float) for right in range(count + 1)]
    found = [bootstrap.mean(one) for one in values]
    for truth in np.linspace(0.02, 0.98, 97):
        likely = stats.binom.pmf(np.arange(count + 1), count, truth)
        held = [one.low <= truth <= one.high for one in found]
        assert likely @ held >= 0.95 - 1e-9, truth


def test_all_right_is_no_certainty():
    found = bootstrap.mean(np.ones(50))
    assert found.high == 1 and found.low == pytest.approx(0.025 ** (1 / 50))
    none = bootstrap.mean(np.zeros(50))
    assert none.low == 0 and none.high == pytest.approx(1 - 0.025 ** (1 / 50))


def error_counts(rng, count, rate, bursts):
    """Utterances of 4 to 20 characters; with bursts whole utterances are misheard."""
    lengths = rng.integers(4, 21, count)
    chance = rng.beta(2 * rate, 2 * (1 - rate), count) if bursts else rate
    return rng.binomial(lengths, chance), lengths


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("rate", [0.02, 0.3])
@pytest.mark.parametrize("bursts", [False, True])
def test_error_rates(count, rate, bursts):
    draw = lambda rng: error_counts(rng, count, rate, bursts)  # noqa: E731
    assert coverage(draw, rate, quick(bootstrap.ratio)) >= LEAST


MEANS = {
    "cider": (lambda rng, n: 10 * rng.beta(0.7, 1.5, n), 10 * 0.7 / 2.2),
    "exponential": (lambda rng, n: rng.exponential(1, n), 1.0),
    "lognormal": (lambda rng, n: rng.lognormal(0, 0.8, n), np.exp(0.32)),
    "nearly all right": (lambda rng, n: rng.choice([1, 0.5, 0], n, p=[0.9, 0.07, 0.03]), 0.935),
    "normal": (lambda rng, n: rng.normal(3, 1, n), 3.0),
}


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("name", MEANS)
def test_means(count, name):
    draw, truth = MEANS[name]
    assert coverage(lambda rng: (draw(rng, count),), truth, quick(bootstrap.mean)) >= LEAST


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("gained, lost", [(0.02, 0.01), (0.1, 0.05), (0.3, 0.0), (0.4, 0.3)])
def test_paired_differences_of_right_answers(count, gained, lost):
    def draw(rng):
        kind = rng.choice(4, count, p=[gained, lost, 0.2, 0.8 - gained - lost])
        return (kind == 1) | (kind == 2), (kind == 0) | (kind == 2)

    assert coverage(draw, gained - lost, quick(bootstrap.mean_difference)) >= LEAST


def test_a_difference_that_no_sample_contradicts_is_not_certain():
    """That none of 40 got worse does not say that none would."""
    zeros, one, all_right = np.zeros(40), np.zeros(40), np.ones(40)
    one[7] = 1
    same = bootstrap.mean_difference(zeros, zeros)
    assert same.value == 0 and 0.05 < same.high < 0.12
    assert same.low == pytest.approx(-same.high, rel=0.1)
    better, worse = (bootstrap.mean_difference(*pair) for pair in ((zeros, one), (one, zeros)))
    assert better.low < 0 < better.value < better.high
    assert worse.low == pytest.approx(-better.high, rel=0.1) and worse.high > 0
    assert bootstrap.mean_difference(zeros, all_right).low > 0.75


@pytest.mark.parametrize("count", SIZES)
def test_paired_differences_of_scores(count):
    def draw(rng):
        hard = rng.exponential(1, count)
        return hard, hard * rng.uniform(0.5, 2.5, count)

    assert coverage(draw, 0.5, quick(bootstrap.mean_difference)) >= LEAST


def spoken(lengths):
    return [Example(str(i), transcript="一" * length) for i, length in enumerate(lengths)]


def test_every_score_of_equal_samples_keeps_its_doubt():
    """Nothing wrong in twelve samples: the scorers' own scales say how much may be wrong."""
    examples = [
        Example(str(i), answer=f"有一个{c}色的球") for i, c in enumerate("红绿蓝黄黑白" * 2)
    ]
    right = [example.answer for example in examples]
    for scorer in (scorers.caption, scorers.short_answer):
        for name, score in scorer(right, examples).items():
            found = score.estimate()
            assert found.value == found.high == pytest.approx(score.scale[1]), name
            assert 0.6 * found.value < found.low < 0.95 * found.value, name
    said = spoken([8] * 12)
    found = scorers.transcription(["一" * 8] * 12, said)["cer"].estimate()
    assert found.low == found.value == 0 and 0.15 < found.high < 0.35


def test_corpus_rates_of_two_models_are_compared_in_pairs():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(150):
        lengths = rng.integers(5, 15, 20)
        first, second = (rng.binomial(lengths, rate) for rate in (0.2, 0.1))
        said = spoken(lengths)
        heard = [["二" * e + "一" * (n - e) for e, n in zip(w, lengths)] for w in (first, second)]
        told = [scorers.transcription(texts, said) for texts in heard]
        found = measure.difference(told[0]["cer"], told[1]["cer"])
        hits += found["low"] <= 0.1 <= found["high"]
    assert hits / 150 >= LEAST
    same = measure.difference(told[0]["cer"], dataclasses.replace(told[0]["cer"]))
    assert same["low"] < 0 == same["value"] < same["high"]


def test_reports_never_leave_the_scale():
    answers = ["是"] * 14 + ["否"]
    examples = [Example(str(i), answer="是") for i in range(15)]
    score = scorers.short_answer(answers, examples)["accuracy"]
    found = measure.difference(score, score)
    assert -1 <= found["low"] <= 0 <= found["high"] <= 1
    assert 0 < score.estimate().low < 14 / 15 < score.estimate().high < 1
