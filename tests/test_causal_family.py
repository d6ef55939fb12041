"""Text of causal LLMs: ids against transformers, templates, rows."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.text import causal_tokenizer, prompt, templates
from xllm_jax.data.text.llm_families import causal, vicuna_v0

TEXTS = [
    "The red circle is left of the blue square.",
    "图中有一个红色的圆，在蓝色方块的左边。",
    "How many? 1, 22, 333! (It's café-time…)",
    "def f(x):\n    return {'a': x}\t# tabs\r\n",
    "🙂🙃 Ωμέγα ไทย עברית",
]
SPECIALS = {
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "glm4": ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"],
}
START = {"llama3": ["<|begin_of_text|>"], "chatml": [], "glm4": ["[gMASK]", "<sop>"]}
END = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "glm4": "<|user|>"}


def strings(count: int = 1000) -> list[str]:
    """Pieces of the texts, joined by chance."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        parts = []
        for _ in range(int(rng.integers(1, 5))):
            text = TEXTS[int(rng.integers(len(TEXTS)))]
            start, end = np.sort(rng.integers(0, len(text) + 1, 2))
            parts.append(text[start:end])
        made.append(("", " ", "\n", "  ")[int(rng.integers(4))].join(parts))
    return made


def write_fast(folder, kind: str):
    """A byte-level tokenizer as LLaMA 3, Qwen and GLM-4 publish it."""
    folder.mkdir()
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS[kind], initial_alphabet=alphabet
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    first = START[kind]
    if first:
        single = " ".join([*first, "$A"])
        ids = [(token, made.token_to_id(token)) for token in first]
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    made.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("kind", SPECIALS)
def test_ids_of_a_tokenizer_json_are_those_of_transformers(kind, tmp_path):
    folder = write_fast(tmp_path / "fast", kind)
    ours = causal_tokenizer.load(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    for text in [*strings(), f"a{END[kind]}b", ""]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert [*ours.start, *ours.encode(text)] == theirs(text)["input_ids"]
        plain = theirs.decode(ours.encode(text), skip_special_tokens=True)
        assert ours.decode(ours.encode(text)) == plain
    assert ours.decode([*ours.encode("red"), 10**6]) == "red"  # an LLM has more rows than pieces


@pytest.mark.golden
def test_ids_of_a_tokenizer_model_are_those_of_transformers(golden):
    folder = golden / "nextgpt" / "tokenizer"
    ours = causal_tokenizer.load(folder)
    theirs = transformers.LlamaTokenizer.from_pretrained(str(folder))
    # Spaces at the start are another matter: transformers 5 leaves one of them out there.
    texts = [text.lstrip(" ") for text in strings()]
    for text in texts:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.golden
def test_texts_are_the_recorded_ones(golden):
    """Tokens that are added to the tokenizer, and the pieces around them."""
    cases = json.loads((golden / "nextgpt" / "formats_cases.json").read_text("utf-8"))
    tokenizer = causal_tokenizer.SentencePieceTokenizer(
        golden / "nextgpt" / "tokenizer", cases["added_tokens"]
    )
    assert {piece: tokenizer.find(piece) for piece in cases["added_tokens"]} == cases[
        "added_tokens"
    ]
    for case in cases["tokenizer"]:
        ids = tokenizer.encode(case["text"])
        assert ids == case["ids"] and [tokenizer.piece(token) for token in ids] == case["pieces"]
        assert [*tokenizer.start, *ids] == case["ids_with_bos"]
        assert tokenizer.decode(ids) == case["decoded_skip"]


@pytest.mark.golden
def test_vicunas_prompts_are_the_recorded_ones(golden):
    cases = json.loads((golden / "nextgpt" / "formats_cases.json").read_text("utf-8"))["chat"]
    tokenizer = causal_tokenizer.load(golden / "nextgpt" / "tokenizer")
    names = {"v0": "vicuna_v0", "v1": "vicuna_v1", "vicuna_v1": "vicuna_v1"}
    for case in cases["cases"]:
        style = templates.template(names[case["template"]])
        *earlier, (question, answer) = case["turns"]
        example = Example("e", (), question, history=tuple(map(tuple, earlier)))
        made = prompt.segments((), prompt.words(example, question, style), lambda *_: None)
        (text,) = made
        if answer is None:
            assert text.text == case["prompt"] and tokenizer.encode(text.text) == case["ids"]
        else:
            assert case["prompt"].startswith(f"{text.text} {answer}")


CHATS = {
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "chatml": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "glm4": "<|user|>\n{}<|assistant|>\n",
}


@pytest.mark.parametrize("kind", SPECIALS)
def test_rows_of_each_template(kind, tmp_path):
    """What is put in front, the roles' tags as single ids, the answer and its end learnt."""
    family = causal.Family(str(write_fast(tmp_path / "fast", kind)))
    tokenizer = family.tokenizer
    example = Example("e", (("image", "a.png"),), "red?", "blue", history=(("one", "two"),))
    made = prompt.build(
        example,
        family,
        templates.template(kind),
        lambda modality, path: prompt.Slot(modality, path, 1, 3, 3),
        prompt.Limits(200, 40),
        np.random.default_rng(0),
    )
    places = np.flatnonzero(made.index["image"] >= 0)
    before, after = made.ids[: places[0]], made.ids[places[-1] + 1 :]
    start = [tokenizer.find(token) for token in START[kind]]
    end = tokenizer.find(END[kind])
    head, tail = CHATS[kind].split("{}")
    earlier = CHATS[kind].format("one") + "two" + ("" if kind == "glm4" else END[kind])
    earlier += "\n" if kind == "chatml" else ""
    words = tokenizer.encode(earlier + head) + tokenizer.encode("<Image>")
    assert before.tolist() == [*start, *words]
    answer = [*tokenizer.encode("blue"), end]
    wanted = [*tokenizer.encode("</Image>"), *tokenizer.encode(f"red?{tail}"), *answer]
    assert after.tolist() == wanted and made.targets.tolist() == answer
    np.testing.assert_array_equal(made.ids[made.answer_index + 1], made.targets)
    assert made.positions[:, 0].tolist() == list(range(len(made.ids))) and not made.context.any()
    assert family.ends[0] == end and end in family.specials
    opened = prompt.build(
        Example("e", (), "red?"),
        family,
        templates.template(kind),
        lambda *_: None,
        prompt.Limits(200, 40),
        np.random.default_rng(0),
        answer=False,
    )
    assert opened.ids.tolist() == [*start, *tokenizer.encode(CHATS[kind].format("red?"))]


def test_text_alone_is_learnt_from_its_second_token_where_nothing_stands_before(tmp_path):
    family = causal.Family(str(write_fast(tmp_path / "fast", "chatml")))
    row = family.text_row([7, 8, 9], np.random.default_rng(0))
    assert row.ids.tolist() == [7, 8, 9, family.ends[0]]
    assert row.targets.tolist() == [8, 9, family.ends[0]] and row.answer_index.tolist() == [0, 1, 2]
    other = causal.Family(str(write_fast(tmp_path / "more", "llama3")))
    row = other.text_row([7, 8], np.random.default_rng(0))
    assert row.ids.tolist() == [other.start[0], 7, 8, other.ends[0]]
    assert row.targets.tolist() == [7, 8, other.ends[0]]


@pytest.mark.parametrize("kind", SPECIALS)
def test_ids_that_no_text_gives_are_spare(kind, tmp_path):
    """Published tables are often longer than their tokenizer: signal tokens may stand there."""
    folder = write_fast(tmp_path / "fast", kind)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert not causal.Family(str(folder)).spare
    (folder / "config.json").write_text(json.dumps({"vocab_size": len(theirs) + 7}))
    assert causal.Family(str(folder)).spare == range(len(theirs), len(theirs) + 7)


def test_ends_are_those_of_the_configuration_too(tmp_path):
    folder = write_fast(tmp_path / "fast", "glm4")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3, 390]}))
    assert causal.Family(str(folder)).ends == (3, 0, 390)


@pytest.mark.golden
def test_vicuna_v0_ends_in_a_line(golden):
    folder = str(golden / "nextgpt" / "tokenizer")
    family = vicuna_v0.Family(folder)
    behind, alone = json.loads((golden / "nextgpt" / "generation.json").read_text())["config"][
        "stop_ids"
    ]
    assert {*behind, *alone} <= set(family.ends) and family.pad == 2
    row = family.row([5, 6], [7])
    assert row.ids.tolist() == [1, 5, 6, 7, 13, *behind]
    assert row.targets.tolist() == [7, 13, *behind]


def test_folders_without_a_tokenizer_and_damaged_ones(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        causal.Family(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer.model"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text("{]")
        with pytest.raises(UserError, match="is no tokenizer") as refusal:
            causal.Family(str(folder))
        assert name in refusal.value.field and "\n" not in str(refusal.value)
    folder = write_fast(tmp_path / "endless", "llama3")
    text = (folder / "tokenizer.json").read_text().replace("<|eot_id|>", "<|other|>")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no token that ends an answer"):
        causal.Family(str(folder))
