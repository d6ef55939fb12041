"""Metrics of the suites: what published packages gave, rules by hand, and enumeration."""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.core.suite import CaptionSuite
from xllm_jax.evaluation import (
    bootstrap,
    caption_metrics,
    error_rate,
    paired,
    scorers,
    transcript_forms,
    vqa_accuracy,
)
from xllm_jax.evaluation.suites import captions

SAID = [
    "A red circle left of a blue square.",
    "two cats sit on the mat",
    "a man rides a horse, on the beach",
    "green triangle",
]
ACCEPTED = [
    ["a red circle is left of a blue square", "the blue square is right of a red circle"],
    ["two cats on a mat", "a pair of cats sit on the mat"],
    ["a man rides a brown horse along the beach"],
    ["a large green triangle", "one green triangle in the middle"],
]


def test_words_equal_what_cocos_evaluation_gives():
    """Recorded with pycocoevalcap 1.2 on the same texts without their signs and letter case."""
    words = caption_metrics.spaced_words
    cider = [5.093053753062468, 4.435623521841939, 4.329449520922686, 2.7288175990813954]
    rouge = [0.931297709923664, 0.8133333333333334, 0.8148854961832059, 0.6288659793814433]
    np.testing.assert_allclose(caption_metrics.cider(SAID, ACCEPTED, words), cider, rtol=1e-12)
    np.testing.assert_allclose(caption_metrics.rouge_l(SAID, ACCEPTED, words), rouge, rtol=1e-12)
    sums = caption_metrics.bleu_statistics(SAID, ACCEPTED, split=words).sum(0)
    # It adds 1e-15 and 1e-9 to what it divides.
    assert caption_metrics.bleu_value(sums) == pytest.approx(0.5631863623463149, rel=1e-8)


def test_rouge_l_is_between_its_ends():
    texts = [["红色的圆在左边"], ["蓝色"], ["x"]]
    found = caption_metrics.rouge_l(["红色的圆在左边", "绿", ""], texts)
    np.testing.assert_array_equal(found, [1, 0, 0])


def test_words_are_cut_by_what_is_named():
    spaces = captions.splitter(CaptionSuite())
    letters = captions.splitter(CaptionSuite(words="builtins:list"))
    assert spaces("Don't  stop!") == ("dont", "stop") and letters("Ab c") == ("a", "b", "c")
    for words in ("jieba", "builtins:len", "os:sep", "nothing.here:cut"):
        with pytest.raises(UserError, match="words"):
            captions.splitter(CaptionSuite(words=words))


# (answer, given, worth), as VQA's published evaluation gives it.
VQA = (
    ("The red", ["red", "red", "red.", "a red", "blue"] + ["green"] * 5, 1.0),
    ("2", ["two"] * 2 + ["3"] * 8, 0.6),
    ("dont know", ["don't know"] * 4 + ["no"] * 6, 1.0),
    ("Yes", ["yes"] * 10, 0.0),
    ("red, blue", ["red blue"] * 3 + ["red and blue"] * 7, 0.9),
    ("1,000", ["1000"] * 5 + ["1,000"] * 5, 1.0),
    ("t-shirt", ["t shirt"] * 9 + ["shirt"], 1.0),
    ("maybe", ["yes"] * 5 + ["no"] * 5, 0.0),
)


@pytest.mark.parametrize("answer, given, worth", VQA)
def test_vqa_accuracy(answer, given, worth):
    assert vqa_accuracy.accuracy(answer, given) == pytest.approx(worth, abs=1e-12)


def test_vqa_accuracy_leaves_each_person_out():
    given = ["一"] * 3 + ["二"] * 7
    assert vqa_accuracy.text_accuracy("一。", given) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert [vqa_accuracy.text_accuracy(a, ["红色的"]) for a in ("红色", "蓝")] == [1, 0]


def test_contractions_miss_one_apostrophe():
    found = vqa_accuracy.CONTRACTIONS
    assert found["dont"] == "don't" and found["couldnt've"] == found["couldn'tve"] == "couldn't've"
    assert "couldntve" not in found and "hell" not in found
    assert (
        vqa_accuracy.normalized("It's none of the 3.5 e.g. t-shirts") == "it's 0 of 3.5 eg t shirts"
    )


PLACES = {"十": 10, "百": 100, "千": 1000}


def amount(said: str) -> int:
    """A Chinese amount as a number: the other way round, digit by digit."""
    total = part = digit = 0
    for sign in said:
        if sign in transcript_forms.DIGITS:
            digit = transcript_forms.DIGITS.index(sign)
        elif sign in PLACES:
            part, digit = part + (digit or 1) * PLACES[sign], 0
        else:
            scale = {"万": 10**4, "亿": 10**8}[sign]
            total, part, digit = total + (part + digit) * scale, 0, 0
    return total + part + digit


def test_amounts_are_read_as_people_read_them():
    known = {105: "一百零五", 12: "十二", 20: "二十", 1010: "一千零一十", 10001: "一万零一"}
    known |= {110000: "十一万", 0: "零", 100010000: "一亿零一万", 10**9 + 1: "十亿零一"}
    assert {n: transcript_forms.cardinal(n) for n in known} == known
    rng = np.random.default_rng(0)
    for digits in range(1, 13):
        for number in rng.integers(0, 10**digits, 40).tolist():
            said = transcript_forms.cardinal(number)
            assert amount(said) == number and "零零" not in said and "万亿" not in said


FORMS = (
    ("nfkc+lower", "ＡＢ，Ｃ 1", "ab,c 1"),
    ("nfkc+spaces+punctuation", "你 好，ok！+1", "你好ok+1"),
    ("symbols", "1+1=2", "112"),
    ("tags+spaces", "<NOISE> 好", "好"),
    ("digits", "2023年〇5", "二零二三年零五"),
    ("numbers", "2023年有25%的人, 007号, 3.14", "二零二三年有百分之二十五的人, 零零七号, 三点一四"),
    ("nfkc+numbers", "１２３４５６７８９０１２３", "一二三四五六七八九零一二三"),
)


@pytest.mark.parametrize("name, text, wanted", FORMS)
def test_forms_are_steps_in_their_order(name, text, wanted):
    assert transcript_forms.form(name)(text, text) == (wanted, wanted)
    assert all(transcript_forms.STATED[step] in transcript_forms.stated(name)
               for step in name.split("+"))  # fmt: skip


def test_named_forms_are_those_of_error_rate():
    assert transcript_forms.STEPS.keys() == transcript_forms.STATED.keys()
    pair = "《红》 A1！", "红a"
    steps = "nfkc+lower+spaces+punctuation+symbols"
    assert transcript_forms.form(steps)(*pair) == error_rate.normalized(*pair)
    assert transcript_forms.form("xllm") is error_rate.xllm
    with pytest.raises(UserError, match=r"unknown form 'low'.*normalized.*nfkc"):
        transcript_forms.form("nfkc+low")


@functools.cache
def all_edits(first: str, second: str) -> frozenset[tuple[int, int, int]]:
    """Counts of every way from one text to the other."""
    if not first or not second:
        return frozenset({(0, len(first), len(second))})
    same = first[0] == second[0]
    ways = {(s + (not same), d, i) for s, d, i in all_edits(first[1:], second[1:])}
    ways |= {(s, d + 1, i) for s, d, i in all_edits(first[1:], second)}
    ways |= {(s, d, i + 1) for s, d, i in all_edits(first, second[1:])}
    return frozenset(ways)


def test_edit_counts_are_the_shortest_way_with_the_most_replacements():
    for one in map("".join, itertools.product("ab", repeat=3)):
        for other in map("".join, itertools.product("abc", repeat=4)):
            best = min(all_edits(one, other), key=lambda way: (sum(way), -way[0]))
            assert error_rate.edit_counts(one, other) == best
    assert error_rate.edit_counts("", "ab") == (0, 0, 2) and error_rate.edit_counts("ab", "") == (
        *(0, 2),
        0,
    )


def rates(errors: list[int], lengths: list[int]) -> scorers.Score:
    """Error rates of utterances."""
    sums = np.array([errors, lengths], np.float64).T
    alone = sums[:, 0] / sums[:, 1]
    return scorers.Score(sums, bootstrap.rate, bootstrap.rate_ends(sums), alone, higher=False)


def test_randomization_is_near_what_all_coins_give():
    lengths = [4, 7, 3, 9, 5, 6, 8, 4]
    one, other = rates([1, 3, 0, 4, 2, 1, 3, 2], lengths), rates([0, 1, 0, 2, 2, 2, 1, 0], lengths)
    found = abs(other.value(other.sums.sum(0)) - one.value(one.sums.sum(0)))
    larger = 0
    for coins in itertools.product((0, 1), repeat=8):
        swap = np.array(coins)[:, None]
        a = (one.sums * (1 - swap) + other.sums * swap).sum(0)
        b = (other.sums * (1 - swap) + one.sums * swap).sum(0)
        larger += abs(one.value(a) - one.value(b)) >= found - 1e-12
    exact = larger / 2**8
    assert 0.01 < exact < 0.2
    p = paired.probability(one, other)
    assert abs(p - exact) < 4 * math.sqrt(exact * (1 - exact) / paired.ROUNDS) + 2 / paired.ROUNDS
    assert paired.probability(one, one) == 1 and p == paired.probability(other, one)
    gain = paired.compared(one, other)
    assert gain["value"] == pytest.approx(found, abs=1e-6) and gain["low"] < found < gain["high"]
