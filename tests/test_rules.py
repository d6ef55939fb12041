"""Path rules: total, used, first match wins; split and join lose nothing."""

from __future__ import annotations

import pytest

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError

TREE = {"llm": {"layers": {"kernel": 1, "bias": 2}}, "image_interface": {"adapter": {"kernel": 3}}}


def test_flatten_and_unflatten_are_inverse():
    flat = rules.flatten(TREE)
    assert flat == {
        "image_interface/adapter/kernel": 3,
        "llm/layers/bias": 2,
        "llm/layers/kernel": 1,
    }
    assert rules.unflatten(flat) == TREE


def test_first_match_wins_on_the_whole_path():
    table = ((r".*/bias", "b"), (r"llm/.*", "l"), (r".*", "rest"))
    assert rules.flatten(rules.assign(table, TREE)) == {
        "image_interface/adapter/kernel": "rest",
        "llm/layers/bias": "b",
        "llm/layers/kernel": "l",
    }


def test_a_leaf_without_a_row_is_an_error():
    with pytest.raises(UserError, match="image_interface/adapter/kernel"):
        rules.assign(((r"llm/.*", 0),), TREE)


def test_a_row_without_a_leaf_is_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match="llm/layers/kernel"):
        rules.assign(((r"llm/layers/kernle", 0), (r".*", 1)), TREE)


def test_split_and_join_give_the_tree_back():
    chosen, rest = rules.split((r".*/adapter/.*",), TREE)
    assert chosen == {"image_interface": {"adapter": {"kernel": 3}}}
    assert rest == {"llm": TREE["llm"]}
    assert rules.join(chosen, rest) == TREE


def test_split_refuses_a_pattern_that_chooses_nothing():
    with pytest.raises(UserError, match="matches no parameter"):
        rules.split((r"image_interfaces/.*",), TREE)


def test_join_refuses_a_leaf_in_both_halves():
    with pytest.raises(ValueError, match="both halves"):
        rules.join(TREE, {"llm": {"layers": {"bias": 0}}})
