"""Messages name kinds of values in words that do not need Python."""

import pytest
import reader_fixtures as fixtures

from xllm_jax.core import words
from xllm_jax.core.damage import read_object
from xllm_jax.core.errors import UserError
from xllm_jax.data.rows import columns
from xllm_jax.data.sources import layout

SAID = {"null": None, "true or false": True, "a number": 1.5, "a list": [1], "a text": "x"}


@pytest.mark.parametrize("word", SAID)
def test_what_a_value_is(word, tmp_path):
    value = SAID[word]
    with pytest.raises(UserError, match=f"is {word}, not an object"):
        layout.get(value, "a", str, "here")
    if word != "a text":
        with pytest.raises(UserError, match=f"is {word}, not a text"):
            layout.get({"a": value}, "a", str, "here")
        with pytest.raises(UserError, match=f"is {word}, not a text"):
            named = columns.Columns({}, answer="said")
            columns.example({"said": [value]}, named, "1", "here", 0)
    fixtures.write(tmp_path / "a.json", [] if word == "a list" else {"null": "null"}.get(word, "3"))
    with pytest.raises(UserError, match=r"no JSON object but (a list|null|a number)"):
        read_object(tmp_path / "a.json")


def test_kinds_that_may_be_wanted():
    assert words.wanted((str, list)) == "a text or a list"
    assert words.wanted((int, float)) == "a number"
