"""LLM families: a second one takes nothing but its class, and nobody else knows GLM by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_stage

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data, Source
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.data import mixture
from xllm_jax.data.batching import batch_format
from xllm_jax.data.example import Example
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.text import llm_family, prompt, templates
from xllm_jax.data.text.llm_families import glm
from xllm_jax.data.text.token_rows import Row, pack
from xllm_jax.inference import assistant, decoding, replies
from xllm_jax.inference.load_run import Restored
from xllm_jax.models.xllm import XLLM

ROOT = Path(__file__).parents[1]
BOS, EOS, STOP, PAD = 1, 2, 3, 4
LETTERS = "abcdefghijklmnopqrstuvwxyz<>/IV mage?"


class Letters:
    """Every letter is a token, from id 10 on."""

    def encode(self, text: str) -> list[int]:
        return [10 + LETTERS.index(letter) for letter in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(LETTERS[token - 10] for token in ids if token >= 10)

    def piece(self, token: int) -> str:
        return f"<{token}>" if token < 10 else LETTERS[token - 10]


class Causal(llm_family.LLMFamily):
    """`BOS prompt answer EOS`: causal, one number to a position, two ends."""

    def __init__(self, folder: str):
        self.folder, self.tokenizer = folder, Letters()
        self.ends, self.pad, self.specials = (EOS, STOP), PAD, frozenset({BOS, EOS, STOP, PAD})

    def row(self, prompt: Sequence[int], answer: Sequence[int] | None = None) -> Row:
        targets = [] if answer is None else [*answer, EOS]
        ids = np.asarray([BOS, *prompt, *targets], np.int32)
        return Row(
            ids=ids,
            positions=np.arange(len(ids), dtype=np.int32)[:, None],
            context=np.zeros(len(ids), bool),
            segments=np.ones(len(ids), np.int32),
            answer_index=(len(prompt) + np.arange(len(targets))).astype(np.int32),
            targets=np.asarray(targets, np.int32),
            start=1,
        )


FAMILY = Causal("")


def build(example: Example, answer: bool = True, **limits: Any) -> prompt.Prompt:
    sizes = prompt.Limits(**({"length": 30, "answers": 8} | limits))

    def slot(modality: str, path: str) -> prompt.Slot:
        return prompt.Slot(modality, path, 1, 3, 3)

    style, rng = templates.template("plain"), np.random.default_rng(0)
    return prompt.build(example, FAMILY, style, slot, sizes, rng, answer)


def test_a_prompt_of_another_family():
    made = build(Example("e", (("image", "a"),), "see<image>", "abc"))
    words = FAMILY.tokenizer.encode("see<Image></Image>")
    ids = [BOS, *words[:10], 0, 0, 0, *words[10:], *FAMILY.tokenizer.encode("abc"), EOS]
    assert made.ids.tolist() == ids and made.positions.tolist() == [[i] for i in range(len(ids))]
    assert np.flatnonzero(made.index["image"] >= 0).tolist() == [11, 12, 13]
    np.testing.assert_array_equal(made.targets, made.ids[made.answer_index + 1])
    assert made.targets.tolist() == ids[-4:] and not made.context.any()
    opened = build(Example("e", (), "see", "abc"), answer=False)
    assert opened.ids.tolist() == [BOS, *words[:3]] and not len(opened.targets)


def test_long_text_leaves_place_for_the_familys_own_tokens():
    made = build(Example("e", (), "a" * 40, "b" * 20))
    assert len(made.ids) == 30 and len(made.targets) == 8 and made.targets[-1] == EOS
    assert made.cut == (40 - (30 - 8 - 1), 20 - 7)
    with pytest.raises(prompt.DoesNotFit, match="takes 49 tokens"):
        build(Example("e", (), "a" * 40, "b" * 20), strict=True)
    text = prompt.text_only(
        Example("e", answer="abcdefghij"), FAMILY, prompt.Limits(12, 6), np.random.default_rng(1)
    )
    assert FAMILY.tokenizer.decode(text.ids) in "abcdefghij" and len(text.targets) == 6
    assert text.ids[0] == BOS and text.cut == (0, 5)


def data(**fields: Any) -> Data:
    made = {"examples": 4, "rows": 2, "length": 24, "answers": 10, "threads": 1}
    family = f"{__name__}:Causal"
    made |= {"sources": {"a": Source("list")}, "template": "plain", "llm_family": family}
    return Data(**(made | fields))


@pytest.mark.parametrize("form", ["conversation", "blank_infilling"])
def test_batches_of_another_family(monkeypatch, form):
    """Rows are packed with one number to a position, and the preflight knows their shapes."""
    examples = [Example(f"e{i}", (), "abc"[:i], "xyz"[: i or 1], "vqa") for i in range(1, 4)]
    examples.append(Example("text", (), "", "hello", "text"))
    asked = [e for e in examples if form == "blank_infilling" or e.instruction]
    monkeypatch.setattr(mixture, "read", lambda *_, **__: asked)
    made = data(batch_format=form)
    batch, info = next(Pipeline(made, train=False).iterate())
    assert batch.positions.shape == (2, 24, 1) and len(info["keys"]) == len(asked)
    expected = batch_format.find(made).shapes()
    assert jax.tree.map(lambda x: x.shape, expected) == jax.tree.map(lambda x: x.shape, batch)
    for row, segment, example in info["members"]:
        here = batch.segments[row] == segment
        answer = FAMILY.tokenizer.encode(example.answer)
        words = FAMILY.tokenizer.encode(example.instruction)
        assert batch.ids[row, here].tolist() == [BOS, *words, *answer, EOS]
        assert batch.positions[row, here, 0].tolist() == list(range(here.sum()))
    learnt = batch.weights > 0
    after = np.take_along_axis(batch.ids, batch.answer_index + 1, axis=1)
    np.testing.assert_array_equal(after[learnt], batch.targets[learnt])


class Counter:
    """An LLM that repeats what it fed on: the next token is the position of the last one, + 10."""

    def apply(self, variables: Any, *args: Any, method: str = "", **options: Any) -> Any:
        return getattr(self, method or "run")(*args, **options)

    def embed(self, ids: Any) -> Any:
        return jnp.zeros((*ids.shape, 1))

    def run(self, x: Any, segments: Any, context: Any, positions: Any, cache: Any = None) -> Any:
        return positions.astype(jnp.float32), cache

    def init_cache(self, rows: int, length: int, prefix: Any = None) -> dict[str, Any]:
        return {"length": jnp.zeros(rows, jnp.int32)}

    def logits(self, x: Any) -> Any:
        return jax.nn.one_hot(self.token(x[..., 0]), 64) * 9.0

    def token(self, position: Any) -> Any:
        return jnp.where(position >= self.end, STOP, position + 10).astype(jnp.int32)

    end = 6


def test_decoding_counts_on_and_stops_as_the_family_says():
    """Positions go on by one from the last token of the prompt; any of the ends ends a row."""
    model = XLLM({"llm": Counter()})
    batch = decoding.prompt_batch([FAMILY.row([10, 10]), FAMILY.row([10])], PAD, (8,))
    how = decoding.Decoding.of(FAMILY, max_new_tokens=7)
    tokens = np.asarray(decoding.generate(model, {"llm": {}}, batch, how).tokens)
    assert tokens.tolist() == [
        [12, 13, 14, 15, STOP, PAD, PAD],
        [11, 12, 13, 14, 15, STOP, PAD],
    ]
    said = [replies.answer_tokens(row.tolist(), FAMILY) for row in tokens]
    assert list(map(FAMILY.tokenizer.decode, said)) == ["cdef", "bcdef"]


def test_the_assistant_answers_with_another_family():
    stage = small_stage.stage(data=data(length=64))
    restored = Restored(XLLM({"llm": Counter()}), {"llm": {}}, stage)
    model = assistant.Assistant(restored, rows=2, max_tokens=7)
    assert model.answers([Example("a", (), "abc"), Example("b", (), "a")]) == ["def", "bcdef"]


def test_families_are_found_by_name():
    assert llm_family.find(Data()) is glm.Family
    with pytest.raises(UserError, match=r"data\.llm_family.*Did you mean 'glm'"):
        llm_family.find(data(llm_family="gml"))
    with pytest.raises(UserError, match="is no LLMFamily"):
        llm_family.find(data(llm_family=f"{__name__}:Letters"))
    record = dataclasses.asdict(small_stage.stage())
    del record["data"]["llm_family"]  # recorded before there were families
    assert llm_family.find(parse_stage(record).data) is glm.Family


def test_glm_is_laid_out_as_before():
    family = glm.Family(str(small_stage.TOKENIZER))
    own, words = family.tokens, family.tokenizer.encode("图中有什么？")
    row = family.row(words, [20, 21])
    ids = [*words, own.gmask, own.sop, 20, 21, own.eop]
    mask = len(words)
    assert row.ids.tolist() == ids and row.targets.tolist() == ids[mask + 1 :]
    later = [[mask, number] for number in range(1, 5)]
    assert row.positions.tolist() == [*([i, 0] for i in range(mask + 1)), *later]
    assert row.context.tolist() == [True] * (mask + 1) + [False] * 4
    assert family.row(words).ids.tolist() == family.tokenizer.encode("图中有什么？", special=True)
    assert decoding.Decoding.of(family).ends == (own.eop,) and family.position_step == (0, 1)
    assert pack([[row]], 16, 8, family.pad).positions.shape == (1, 16, 2)


GENERAL = [
    "xllm_jax/core/batch.py",
    "xllm_jax/data/batching/*.py",
    "xllm_jax/data/text/llm_family.py",
    "xllm_jax/data/text/prompt.py",
    "xllm_jax/data/text/token_rows.py",
    "xllm_jax/data/pipeline.py",
    "xllm_jax/data/manifest.py",
    "xllm_jax/audit/*.py",
    "xllm_jax/inference/*.py",
    "xllm_jax/evaluation/*.py",
    "xllm_jax/objectives/*.py",
    "xllm_jax/preflight/*.py",
]


@pytest.mark.parametrize("pattern", GENERAL)
def test_nobody_else_knows_glm(pattern):
    """By no name; the name of a template is a value that users' stages hold."""
    found = set(ROOT.glob(pattern)) - {ROOT / "xllm_jax/objectives/glm.py"}
    assert found
    for path in found:
        text = re.sub('"(chatglm_zh|glm4)"', "", path.read_text())
        assert not re.search("glm", text, re.IGNORECASE), path
