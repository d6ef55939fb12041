"""Text that comes token by token: what was told stays told, and stop texts never show."""

from __future__ import annotations

import io
import types

import numpy as np
import pytest
import sentencepiece
import small_stage
import test_causal_family as causal_text
import tokenizers
from tokenizers import decoders, models, normalizers

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


@pytest.fixture(scope="module", params=["pieces", "fallback"])
def llama(request, tmp_path_factory):
    """LLaMA's pieces and bytes by either library, which write broken bytes differently."""
    folder = tmp_path_factory.mktemp("tokenizers")
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(causal_text.TEXTS * 3),
        model_writer=trained,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        num_threads=1,
        minloglevel=2,
    )
    if request.param == "pieces":
        (folder / "tokenizer.model").write_bytes(trained.getvalue())
    else:
        write_fallback(folder, trained.getvalue())
    return causal.Family(str(folder))


def write_fallback(folder, trained: bytes) -> None:
    """A model of sentencepiece as a `tokenizer.json`, as LLaMA 2 is published."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained)
    vocabulary = {pieces.id_to_piece(n): n for n in range(pieces.get_piece_size())}
    bpe = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(bpe)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))


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


def long_answers(family, count, length, random=True):
    """Ids of long texts: words, characters of several tokens, bytes, and what has no text."""
    rng = np.random.default_rng(7)
    words = [
        "中",
        "，",
        ", ",
        "! ",
        "\n",
        "🙂",
        "é",
        "鑫淼",
        "[[训练时间]]",
        "    ",
        " word",
        "中,文",
    ]
    for number in range(count):
        ids: list[int] = []
        while len(ids) < length:
            ids += family.tokenizer.encode("".join(rng.choice(words, 12)))
            if random and number % 2:
                ids += map(int, rng.integers(0, family.tokenizer.pieces, 2))
        ids = [token for token in ids if token not in family.ends]
        yield ids[:length] if random else ids  # a cut may leave half a character


def check_long(family, stops, random):
    for ids in long_answers(family, 6, 400, random):
        pieces, stopped = told(family, ids, stops)
        text, raw = "".join(pieces), family.tokenizer.decode(ids)
        whole = family.finish(raw)
        if any(stop in one for stop in stops for one in (raw, whole)):
            assert stopped and not any(stop in text for stop in stops)
            assert whole.startswith(text.rstrip("，！"))
        else:
            assert (text, stopped) == (whole, False)
            assert len("".join(pieces[:-1])) > 0.8 * len(whole)


STOPS = ((), ("never said",), ("淼é", "\n\n"))


@pytest.mark.parametrize("stops", STOPS)
def test_long_answers_are_told_to_the_letter(family, stops):
    """Beyond the window that is decoded again, and most of it before the end."""
    check_long(family, stops, True)


@pytest.mark.parametrize("stops", STOPS)
def test_long_answers_in_pieces_and_bytes(llama, stops):
    """Of whole characters: where a byte is broken, the libraries take back what was whole."""
    check_long(llama, stops, False)


def check_costs(family, monkeypatch, stops):
    decode, decoded = family.tokenizer.decode, []

    def counted(ids):
        ids = list(ids)
        decoded.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(family.tokenizer, "decode", counted)
    (ids,) = long_answers(family, 1, 2000, False)
    told(family, ids, stops)
    assert sum(decoded) < 100 * len(ids)
    assert len([one for one in decoded if one > 200]) <= 1  # the whole, in the end


@pytest.mark.parametrize("stops", STOPS[:2])
def test_a_token_costs_the_same_however_long_the_answer_is(family, llama, stops, monkeypatch):
    for one in (family, llama):
        check_costs(one, monkeypatch, stops)


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
