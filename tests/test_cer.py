"""Character error rates against recorded integers."""

from __future__ import annotations

import json

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.evaluation import error_rate


@pytest.fixture(scope="module")
def recorded(golden):
    return json.loads((golden / "speech" / "cer.json").read_text("utf-8"))


RECORDED = {
    "raw": "raw",
    "xllm": "xllm",
    "normalized": "normalised",
}  # as the recording spells them


@pytest.mark.golden
@pytest.mark.parametrize("form", RECORDED)
def test_recorded_integers(recorded, form):
    name = RECORDED[form]
    for case in recorded["cases"]:
        errors, length = error_rate.character_errors(case["ref"], case["hyp"], form)
        assert (errors, length) == (case[name]["errors"], case[name]["ref_len"]), case
        assert errors / length == case[name]["cer"]
        if form != "raw":
            assert error_rate.FORMS[form](case["ref"], case["hyp"]) == (
                case[name]["ref"],
                case[name]["hyp"],
            )
        else:
            assert errors / length == pytest.approx(case["raw"]["jiwer_cer"], abs=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("form", RECORDED)
def test_recorded_corpus_rate(recorded, form):
    cases = recorded["cases"]
    heard = [case for case in cases if form != "xllm" or case["hyp"] != "Error"]
    rate = error_rate.rate(error_rate.character_errors(c["ref"], c["hyp"], form) for c in heard)
    assert rate == recorded[f"{RECORDED[form]}_corpus_cer"]
    assert {c["hyp"] for c in cases if c["xllm"]["skipped"]} == {"Error"}


@pytest.mark.parametrize(
    "first, second, distance",
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edit_distance(first, second, distance):
    assert error_rate.edit_distance(first, second) == distance


def test_failed_decoding_counts_by_default():
    pairs = (("甲乙", "甲乙"), ("丙丁", ""))
    assert error_rate.rate(error_rate.character_errors(*pair) for pair in pairs) == 0.5


def test_long_references_are_not_cut():
    assert error_rate.character_errors("一" * 30, "一" * 20) == (10, 30)


@pytest.mark.parametrize("pairs", [[], [("", "甲"), ("。", "乙")]])
def test_nothing_to_compare_is_an_error(pairs):
    with pytest.raises(UserError, match="no character"):
        error_rate.rate(error_rate.character_errors(*pair) for pair in pairs)


@pytest.mark.parametrize(
    "said",
    [
        "<NOISE>你好",
        "你<SPOKEN_NOISE>好",
        "[LAUGHTER] 你好 <sil/>",
        "＜ＮＯＩＳＥ＞你好",
        "你[笑声]好",
    ],
)
def test_tags_are_left_out_where_it_is_asked_for(said):
    assert error_rate.character_errors(said, "你好", "untagged") == (0, 2)
    assert error_rate.character_errors("你好", said, "untagged") == (0, 2)
    errors, length = error_rate.character_errors(said, "你好")
    assert errors == length - 2 > 0


def test_signs_that_are_no_tags_stay():
    assert error_rate.character_errors("1<2，3>2", "1232", "untagged") == (0, 4)
    assert error_rate.character_errors("a[" + "b" * 40 + "]", "a", "untagged") == (40, 41)
    assert error_rate.STATED.keys() == error_rate.FORMS.keys()


def test_unknown_form_names_the_choices():
    with pytest.raises(UserError, match="normalized"):
        error_rate.character_errors("甲", "甲", "words")
