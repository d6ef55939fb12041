"""WordPiece tokens of the Q-Former: as recorded, and as transformers makes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import BertTokenizer

from xllm_jax.core.errors import UserError
from xllm_jax.data.text.wordpiece import WordPiece

TEXTS = (
    "A man, riding a horse!",
    "两只狗 in café's garden",
    "ÀÉ naïve\u200b x\u00ad",
    "$5+3=8 ^_`|~",
    "",
    "Ⅷ ﬁ İstanbul ǅ",
    "a dog " * 40,
    "x" * 101,
    "tab\tnew\nline\u3000wide",
)


@pytest.fixture(scope="module")
def bert(golden):
    return golden / "vision" / "weights" / "bert-base-uncased"


@pytest.mark.golden
def test_rows_are_the_recorded_ones(golden, bert):
    captions = json.loads((golden / "vision" / "cases_info.json").read_text())
    with np.load(golden / "vision" / "cases_stage1.npz") as recorded:
        expected, mask = recorded["text_input_ids"], recorded["text_attention_mask"]
    found = [texts for texts in lists(captions, "captions") if len(texts) == len(expected)]
    made = [WordPiece(bert).rows(texts, expected.shape[1]) for texts in found]
    assert any(np.array_equal(ids, expected) and np.array_equal(m, mask) for ids, m in made)


def lists(tree, key):
    """Every list stored under `key` anywhere in a JSON tree."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    own = [tree[key]] if isinstance(tree, dict) and isinstance(tree.get(key), list) else []
    return own + [found for child in children for found in lists(child, key)]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_those_of_transformers(bert, text):
    reference = BertTokenizer.from_pretrained(bert)
    assert WordPiece(bert).encode(text) == reference.encode(text, add_special_tokens=False)


def test_special_ids(bert, tmp_path):
    pieces = WordPiece(bert)
    assert pieces.decode == len((bert / "vocab.txt").read_text().splitlines())
    (ids,), (mask,) = pieces.rows(["dog " * 30], 6)
    assert ids[0] == pieces.begin and ids[-1] == pieces.end and mask.all()
    with pytest.raises(UserError, match="no such file"):
        WordPiece(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    with pytest.raises(UserError, match=r"lacks \[CLS\]"):
        WordPiece(tmp_path)
