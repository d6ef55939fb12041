"""Text that comes token by token: what was told stays told, and stop texts never show."""

from __future__ import annotations

import types

import numpy as np
import pytest
import small_stage
import test_causal_family as causal_text

from xllm_jax.core.stage import Signals
from xllm_jax.data.text.llm_families import causal, glm
from xllm_jax.data.text.llm_family import LLMFamily
from xllm_jax.inference import replies
from xllm_jax.serve.pieces import Pieces
from xllm_jax.serve.text_stream import TextStream

NONE = types.MappingProxyType({})


@pytest.fixture(scope="module", params=["glm", "bytes"])
def family(request, tmp_path_factory):
    if request.param == "glm":
        return glm.Family(str(small_stage.TOKENIZER))
    folder = tmp_path_factory.mktemp("tokenizers") / "fast"
    causal_text.write_fast(folder, "chatml")
    return causal.Family(str(folder))


def told(family, tokens, stops=(), registry=NONE):
    """(pieces, whether a stop text came)."""
    stream, pieces = TextStream(family, registry, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.close()], stream.stopped


def answers(family, count):
    """Ids of texts and of nothing sensible, cut anywhere."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        ids = list(rng.integers(0, family.tokenizer.pieces, int(rng.integers(0, 8))))
        words = "".join(
            rng.choice(["中", ",", "! ", " ", "\n", "🙂", "<n", "[[训练", "ab", "é"], 6)
        )
        made = [*map(int, ids), *family.tokenizer.encode(words)]
        yield [token for token in made[: int(rng.integers(1, 20))] if token not in family.ends]


def test_pieces_join_to_the_whole_answer(family):
    """In bytes as in pieces of words, with characters of several tokens."""
    streamed = 0
    for ids in answers(family, 300):
        pieces, _ = told(family, ids)
        assert "".join(pieces) == family.finish(family.tokenizer.decode(ids)), ids
        streamed += sum(map(bool, pieces[:-1]))
    assert streamed > 300


def test_no_piece_holds_a_part_of_a_character(family):
    ids = family.tokenizer.encode("a🙂b中é图🙃")
    pieces, _ = told(family, ids)
    assert "\ufffd" not in "".join(pieces) and "🙂" in "".join(pieces)


def test_an_answer_ends_before_a_stop_text(family):
    """However tokens cut it; what only begins like it is told in the end."""
    for stops in (("b",), ("ab",), ("中\n", "é"), ("🙂中",), (" a", "ab,")):
        for ids in answers(family, 60):
            whole = family.tokenizer.decode(ids)
            pieces, stopped = told(family, ids, stops)
            text = "".join(pieces)
            assert not any(stop in text for stop in stops)
            assert family.finish(whole).startswith(text.rstrip("，！")) or stopped
            if not any(stop in x for stop in stops for x in (whole, family.finish(whole))):
                assert (text, stopped) == (family.finish(whole), False)
            elif any(stop in whole for stop in stops):
                first = min(whole.find(stop) for stop in stops if stop in whole)
                assert stopped and family.finish(whole[:first]).startswith(text)


def test_a_stop_text_that_spans_tokens_ends_at_once(family):
    ids = family.tokenizer.encode("ab中文是，一二三")
    pieces, stopped = told(family, ids, ("中文是",))
    assert (("".join(pieces)), stopped) == ("ab", True) and len(pieces) < len(ids)


def test_signal_tokens_are_no_text():
    family = glm.Family(str(small_stage.TOKENIZER))
    registry, start = {"image": Signals(family.tokenizer.pieces, 3)}, family.tokenizer.pieces
    ids = [*family.tokenizer.encode("是的"), start, start + 1, start + 2]
    pieces, _ = told(family, ids, (), registry)
    assert "".join(pieces) == replies.assemble(ids, registry, {}, family).text(family) == "是的"


def test_a_family_that_does_not_tell_shows_answers_at_their_end():
    class Loud(causal.Family):
        def __init__(self):
            self.tokenizer = glm.Family(str(small_stage.TOKENIZER)).tokenizer

        def finish(self, text):
            return text.upper()

    family: LLMFamily = Loud()
    pieces, _ = told(family, family.tokenizer.encode("abc"))
    assert pieces[-1] == "ABC" and not any(pieces[:-1])


def test_texts_of_single_tokens_keep_their_spaces(family):
    pieces = Pieces(family)
    ids = family.tokenizer.encode("ab ab")
    assert "".join(map(pieces.text, ids)).strip() == "ab ab"
    assert all(pieces.text(token) == "" for token in family.ends)
