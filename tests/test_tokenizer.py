"""ChatGLM's tokenizer against the recorded one, and the tokenizer that we train ourselves."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.text import glm_layout
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer, train_tokenizer


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "chatglm" / "tokenizer"


@pytest.fixture(scope="module")
def cases(folder):
    return json.loads((folder / "tokenizer_cases.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatGLMTokenizer(folder)


@pytest.mark.golden
def test_special_ids(tokenizer, cases):
    found = {piece: tokenizer.piece_id(piece) for piece in cases["special_ids"]}
    assert found == cases["special_ids"]
    assert tokenizer.pieces == cases["vocab_size"]


def pieces(tokenizer, text):
    """Pieces of a text, among which special tokens are found."""
    tokens = []
    for part, found in tokenizer._parts(text):
        tokens += [part] if found else tokenizer._model.encode(part, out_type=str)
    return tokens


@pytest.mark.golden
def test_encode_and_decode(tokenizer, cases):
    assert cases["cases"]
    for case in cases["cases"]:
        text = case["text"]
        assert pieces(tokenizer, text) == case["tokens"], text
        assert tokenizer.encode(text) == case["ids"], text
        assert tokenizer.encode(text, special=True) == case["ids_with_special"], text
        assert tokenizer.decode(case["ids"]) == case["decoded"], text
        assert tokenizer.decode(case["ids_with_special"]) == case["decoded_with_special"], text
    for case in cases["decode"]:
        assert tokenizer.decode(case["ids"]) == case["decoded"]
        assert tokenizer.decode(case["ids"]) == case["decoded_skip_special_tokens"]


@pytest.mark.golden
def test_only_published_blanks_become_spaces(tokenizer):
    """Whatever number the LLM writes between the signs: 2 to 80 are blanks, all else is text."""
    numbers = [*range(100), 100, 800, 10**8, 10**30, "02", "٣", "-5", "", "9" * 5000]
    for number in numbers:
        text = f"甲<|blank_{number}|>乙"
        spaces = " " * number if number in range(2, 81) else None
        expected = f"甲{spaces}乙" if spaces else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.piece_id(f"<image_{'9' * 5000}>") == tokenizer.unk


@pytest.mark.golden
def test_pairs(tokenizer, cases):
    for case in cases["pairs"]:
        assert tokenizer.pair(case["a"], case["b"]) == case["ids"]


@pytest.mark.golden
def test_left_padding(tokenizer, cases):
    """The tokenizer's `_pad`: ids, positions, and its mask (1 = not visible)."""
    for case in cases["batches"]:
        sequences = [tokenizer.encode(text, special=True) for text in case["texts"]]
        length, multiple = (case["kwargs"].get(k, 1) for k in ("max_length", "pad_to_multiple_of"))
        length = max(length, *map(len, sequences))
        row = glm_layout.left_padded(
            sequences, tokenizer.specials, -(-length // multiple) * multiple
        )
        np.testing.assert_array_equal(row.ids, case["input_ids"])
        np.testing.assert_array_equal(row.positions.transpose(0, 2, 1), case["position_ids"])
        real = row.segments > 0
        places = np.arange(row.ids.shape[1])
        seen = row.context[:, None, :] | (places[None, :] <= places[:, None])
        seen = seen & real[:, None, :] & real[:, :, None]
        np.testing.assert_array_equal(~seen, np.asarray(case["attention_mask"])[:, 0].astype(bool))


@pytest.mark.golden
def test_layout_with_image_tokens(folder, cases):
    """The first release keeps 20000 ids for image tokens in front of the text pieces."""
    recorded = cases["with_image_tokens"]
    tokenizer = ChatGLMTokenizer(folder, image_tokens=recorded["num_image_tokens"])
    assert tokenizer.pieces == recorded["vocab_size"]
    for case in recorded["cases"]:
        assert tokenizer.encode(case["text"], special=True) == case["ids_with_special"]
        assert tokenizer.decode(case["ids_with_special"]) == case["decoded"]
    for piece, token in recorded["special_ids"].items():
        assert tokenizer.piece_id(piece) == token
    for key, value in recorded["image_token"].items():
        found = tokenizer.piece(int(key)) if key.isdigit() else tokenizer.piece_id(key)
        assert found == value
    assert tokenizer.decode(recorded["decode_mixed"]["ids"]) == recorded["decode_mixed"]["decoded"]


def test_ids_are_those_of_the_pieces_one_by_one(folder):
    """The fast way against one look-up a piece, with runs of spaces replaced one length a time."""
    generator = np.random.default_rng(0)
    words = ["你好", "word", "<sop>", "[gMASK]", "<pad>", "\n", "\t", "龘", "😀", "<image_3>", "▁"]
    words += ["<|blank_3|>", "<n>", " ", "  ", " " * 79, " " * 80, " " * 81, "\u3000", "é"]
    for tokenizer in (ChatGLMTokenizer(folder), ChatGLMTokenizer(folder, image_tokens=20000)):
        for _ in range(200):
            text = "".join(generator.choice(words, generator.integers(1, 9)))
            tokens = pieces(tokenizer, text)
            assert tokenizer.encode(text) == [tokenizer.piece_id(token) for token in tokens], text
    for length in range(1, 200):
        written = "a" + " " * length + "b"
        for run in range(80, 1, -1):
            written = written.replace(" " * run, f"<|blank_{run}|>")
        tokens = pieces(tokenizer, "a" + " " * length + "b")
        assert tokens == tokenizer._model.encode(written, out_type=str)


def test_ids_without_a_piece_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("你好")
    assert tokenizer.decode([*ids, tokenizer.pieces, tokenizer.pieces + 99]) == "你好"


def test_config_of_another_release_is_refused(folder, tmp_path):
    for file in ("ice_text.model", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    (tmp_path / "config.json").write_text('{"bos_token_id": 150004, "vocab_size": 150528}')
    with pytest.raises(UserError, match="bos_token_id"):
        ChatGLMTokenizer(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        ChatGLMTokenizer(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    shapes, colors = ("圆形", "方块", "三角形"), ("红色", "蓝色", "绿色")
    texts = [f"图片里有一个{c}的{s}。" for s in shapes for c in colors]
    texts += [f"问：{s}是什么颜色？\n答：{c}" for s in shapes for c in colors]
    return texts, train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), learned=80)


def test_trained_tokenizer_has_the_published_layout(trained):
    texts, folder = trained
    tokenizer = ChatGLMTokenizer(folder)
    first = [tokenizer.piece(token) for token in range(5)]
    assert first == ["<unk>", "<s>", "</s>", "<pad>", "<n>"]
    mask = tokenizer.specials.mask
    late = [tokenizer.piece(token) for token in range(mask, tokenizer.pieces)]
    assert " ".join(late[:8]) == "[MASK] [gMASK] [sMASK] <unused_0> <sop> <eop> <ENC> <dBLOCK>"
    assert late[8:10] == ["<|tab|>", "<|blank_2|>"] and late[87] == "<|blank_80|>"
    assert late[88:] == [f"<0x{byte:02X}>" for byte in range(256)]
    for text in texts:
        ids = tokenizer.encode(text)
        assert max(ids) < mask, "a character of the training text fell back to bytes"
        assert tokenizer.decode(ids) == text.replace("：", ":").replace("？", "?")
    assert tokenizer.decode(tokenizer.encode("未见 abc\t   龘")) == "未见 abc\t   龘"


def test_training_is_reproducible(trained, tmp_path):
    texts, folder = trained
    again = train_tokenizer(texts, tmp_path, learned=80)
    assert (again / "ice_text.model").read_bytes() == (folder / "ice_text.model").read_bytes()
