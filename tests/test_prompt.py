"""The prompt's arrays against the recorded GLM layout, and what its segments promise."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.text import prompt, templates
from xllm_jax.data.text.llm_families.glm import Family

IGNORED = -100


@pytest.fixture(scope="module")
def family(golden):
    return Family(str(golden / "chatglm" / "tokenizer"))


def one_item(size, items=1, stride=None):
    return lambda modality, path: prompt.Slot(modality, path, items, size, stride or size)


def build(example, family, slot=None, style="plain", answer=True, length=64, **limits):
    return prompt.build(
        example,
        family,
        templates.template(style),
        slot or one_item(4),
        prompt.Limits(length, limits.pop("answers", 32), **limits),
        np.random.default_rng(0),
        answer,
    )


def labels_of(made, count):
    """What the reference writes as labels, unshifted."""
    labels = np.full(count, IGNORED)
    labels[made.answer_index + 1] = made.targets
    return labels


class Recorded:
    """The tokenizer, with a recorded row's own ids for its question and answer.

    A question that the reference cut inside a character has no text that gives its ids.
    """

    def __init__(self, tokenizer, ids):
        start = int(np.flatnonzero(ids == tokenizer.specials.gmask)[0])
        answer = [int(token) for token in ids[start + 2 :] if token != tokenizer.specials.pad]
        assert answer.pop() == tokenizer.specials.eop
        self.tokenizer = tokenizer
        self.known = {"QUESTION": [int(token) for token in ids[:start]], "ANSWER": answer}

    def encode(self, text):
        return self.known.get(text) or self.tokenizer.encode(text)


def check_row(case, row, prefix, made, recording):
    ids = recording[f"{case}.input_ids"][row]
    positions = recording[f"{case}.position_ids"][row]
    count = len(made.ids)
    np.testing.assert_array_equal(made.ids[prefix:], ids[prefix:count])
    np.testing.assert_array_equal(made.positions.T, positions[:, :count])
    np.testing.assert_array_equal(labels_of(made, len(ids)), recording[f"{case}.labels"][row])
    hidden = recording[f"{case}.attention_mask"][row, 0, :count, :count]
    q, k = np.indices((count, count))
    np.testing.assert_array_equal(made.context[k] | (k <= q), ~hidden)


def recorded(family, ids):
    """The family with the tokenizer of one recorded row."""
    own = copy.copy(family)
    own.tokenizer = Recorded(family.tokenizer, ids)
    return own


@pytest.mark.golden
def test_text_rows_are_the_recorded_ones(golden, family):
    recording = np.load(golden / "chatglm" / "cases_batch.npz")
    rows = recording["train.input_ids"]
    for row, ids in enumerate(rows):
        example = Example("e", instruction="QUESTION", answer="ANSWER")
        made = build(example, recorded(family, ids))
        check_row("train", row, 0, made, recording)


CASES = {
    "image": ("image_features",),
    "video": ("frame_features",),
    "speech": ("speech_features",),
    "both": ("image_features", "speech_features"),
}


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES)
def test_media_rows_are_the_recorded_ones(golden, family, case):
    recording = np.load(golden / "chatglm" / "cases_multimodal.npz")
    features = {n: recording[f"{case}.{n}"] for n in CASES[case]}
    modality = {"image_features": "image", "frame_features": "video", "speech_features": "speech"}
    sizes = {
        modality[n]: (f.shape[1] if f.ndim == 4 else 1, f.shape[-2]) for n, f in features.items()
    }

    def slot(name, path):
        items, size = sizes[name]
        return prompt.Slot(name, path, items, size, size)

    table = word_embeddings(golden)
    rows = recording[f"{case}.input_ids"]
    for row, ids in enumerate(rows):
        prefix = int(np.flatnonzero(ids != prompt.PLACEHOLDER)[0])
        example = Example("e", tuple((n, "file") for n in sizes), "QUESTION", "ANSWER")
        made = build(example, recorded(family, ids[prefix:]), slot, length=len(ids))
        check_row(case, row, prefix, made, recording)
        check_prefix(case, row, prefix, made, recording, features, modality, table)


def word_embeddings(golden):
    for path in sorted((golden / "chatglm" / "weights").glob("*.bin")):
        tensors = torch.load(path, weights_only=True)
        if "transformer.word_embeddings.weight" in tensors:
            return tensors["transformer.word_embeddings.weight"].numpy()
    raise AssertionError("no word embeddings recorded")


def check_prefix(case, row, prefix, made, recording, features, modality, table):
    """Words by id and features by index give the embeddings that the reference spliced."""
    embedded = table[made.ids]
    for name, values in features.items():
        flat = values[row].reshape(-1, values.shape[-1])
        flat = np.maximum(flat, 0) if modality[name] == "speech" else flat
        index = made.index[modality[name]]
        embedded[index >= 0] = flat[index[index >= 0]]
    expected = recording[f"{case}.inputs_embeds"][row]
    np.testing.assert_array_equal(embedded[:prefix], expected[:prefix])


def test_markers_place_media_and_the_others_come_first():
    media = (("image", "a"), ("speech", "s"), ("image", "b"))
    parts = prompt.segments(media, "看<speech>和<image>吗", one_item(2))
    shown = [p.path if isinstance(p, prompt.Slot) else p.text for p in parts]
    assert shown == [
        *("<Image>", "b", "</Image>", "看", "<Speech>", "s", "</Speech>"),
        *("和", "<Image>", "a", "</Image>", "吗"),
    ]


def test_a_marker_without_its_file_is_refused_and_a_foreign_one_is_text():
    with pytest.raises(UserError, match="more <image> markers"):
        prompt.segments((("image", "a"),), "<image><image>", one_item(2))
    (text,) = prompt.segments((), "write <video> in HTML", one_item(2))
    assert text.text == "write <video> in HTML"


def test_index_counts_items_per_modality(family):
    media = (("image", "a"), ("video", "v"), ("image", "b"))
    sizes = {"image": (1, 3, 3), "video": (2, 2, 5)}
    made = build(
        Example("e", media, "q", "a"),
        family,
        lambda name, path: prompt.Slot(name, path, *sizes[name]),
        length=99,
    )
    assert list(made.index["image"][made.index["image"] >= 0]) == [0, 1, 2, 3, 4, 5]
    assert list(made.index["video"][made.index["video"] >= 0]) == [0, 1, 5, 6]
    assert [slot.path for slot in made.slots] == ["a", "v", "b"]


def test_written_media_stand_between_the_tags_of_their_modality(family):
    made = build(Example("e", (("text:image", "描述"),), "问", "答"), family)
    expected = [family.tokenizer.encode(text) for text in ("<Image>", "描述", "</Image>", "问")]
    context = [token for ids in expected for token in ids] + [family.tokens.gmask]
    assert made.ids[made.context].tolist() == context
    assert not made.slots and not made.index


def test_templates_and_rounds():
    example = Example("e", instruction="现在？", history=(("什么？", "猫。"), ("几只？", "两只。")))
    text = prompt.words(example, "现在？", templates.template("chatglm_zh"))
    assert text == (
        "[Round 0]\n问：什么？\n答：猫。\n[Round 1]\n问：几只？\n答：两只。\n"
        "[Round 2]\n问：现在？\n答："
    )
    assert (
        prompt.words(Example("e"), "Hi", templates.template("paper")) == "Question: Hi \n Answer:"
    )
    with pytest.raises(UserError, match="unknown template"):
        templates.template("nope")


def test_long_text_is_cut_as_the_reference_does(family):
    asked, answer = "今天天气好" * 6, "明天天气好" * 6
    made = build(
        Example("e", instruction=asked, answer=answer),
        family,
        length=25,
        answers=13,
    )
    specials = family.tokens
    prompt_ids, answer_ids = family.tokenizer.encode(asked), family.tokenizer.encode(answer)
    tail = [specials.gmask, specials.sop, *answer_ids[:11], specials.eop]
    assert made.ids.tolist() == [*prompt_ids[:11], *tail]
    assert made.cut == (len(prompt_ids) - 11, len(answer_ids) - 11)
    assert made.targets[-1] == specials.eop and len(made.targets) == 13


def test_a_prompt_that_does_not_fit_is_refused_by_name(family):
    example = Example("row 7", (("image", "a"),), "今天天气好" * 6, "好")
    with pytest.raises(prompt.DoesNotFit, match=r"row 7: takes \d+ tokens, its bucket holds 25"):
        build(example, family, length=25, strict=True)
    with pytest.raises(prompt.DoesNotFit):
        build(example, family, one_item(30), length=25)


def test_an_open_prompt_ends_at_sop_and_supervises_nothing(family):
    made = build(Example("e", instruction="问", answer="答"), family, answer=False)
    assert made.ids.tolist() == family.tokenizer.encode("问", special=True)
    assert made.answer_index.size == made.targets.size == 0


def test_an_empty_instruction_is_drawn_from_the_task(family):
    example = Example("e", answer="答", task="caption")
    drawn = {prompt.question(example, np.random.default_rng(seed)) for seed in range(40)}
    assert drawn == set(prompt.instructions("caption"))
    with pytest.raises(UserError, match="no instruction"):
        prompt.question(Example("e", task="vqa"), np.random.default_rng(0))
