"""The text in a column of questions: words or signs, never nothing."""

from __future__ import annotations

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.rows import columns

KINDS = columns.Columns({}, question="asked", answer="said")


def example(asked: object):
    return columns.example(
        {"asked": asked, "said": "红色"}, KINDS, "key", "a.parquet: row 3", 16000
    )


@pytest.mark.parametrize("asked", ["", " \n", b" "])
def test_an_empty_question_costs_its_row_and_names_the_column(asked):
    with pytest.raises(UserError, match=r"a\.parquet: row 3\.asked: is empty"):
        example(asked)


@pytest.mark.parametrize("asked", ["？", "...", "颜色？ "])
def test_a_question_of_signs_alone_is_kept(asked):
    assert example(asked).instruction == asked.strip()
