"""The mini LLM's second pre-training: slots are disturbed, and sentences in them are spelled."""

from __future__ import annotations

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_stage

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.configs import networks, world_llm, world_llm_requests, world_llm_slots
from xllm_jax.core import mesh
from xllm_jax.core.stage import Source
from xllm_jax.data.example import Example
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.data.synthetic_world.text_stream import (
    spoken_characters,
    spoken_words,
    text_example,
)
from xllm_jax.data.text import prompt, templates
from xllm_jax.data.text.instructions import INSTRUCTIONS, UNSEEN_INSTRUCTIONS
from xllm_jax.data.text.llm_families.glm import Family
from xllm_jax.objectives import answer, slot_noise

TAGS = ((5, 6), (7, 8), (9, 10))
# Two kinds of slots, one of them twice, and words around them.
IDS = np.array([[3, 5, 50, 51, 6, 70, 9, 60, 60, 10, 5, 50, 6, 71]])
KINDS = [[0, 0, 1, 1, 0, 0, 0, 3, 3, 0, 0, 1, 0, 0]]
NOTHING = {"clean": 0.0, "turn": 0.0, "shift": 0.0, "mix": 0.0, "noise": 0.0, "stretch": 1.0}


@pytest.fixture(scope="module")
def family():
    return Family(str(small_stage.TOKENIZER))


def disturbed(seed=0, **strengths):
    """Embeddings of IDS, the same for the same id, before and after."""
    table = jax.random.normal(jax.random.key(9), (80, 16))
    x = jnp.tile(table[IDS], (6, 1, 1))
    kinds = jnp.tile(slot_noise.slot_kinds(jnp.asarray(IDS), TAGS), (6, 1))
    y = slot_noise.disturbed(x, kinds, jax.random.key(seed), 3, **(NOTHING | strengths))
    return np.asarray(x), np.asarray(y)


def test_slots_are_what_stands_between_tags():
    assert slot_noise.slot_kinds(jnp.asarray(IDS), TAGS).tolist() == KINDS


def test_words_outside_of_slots_stay_and_nothing_changes_without_strength():
    x, y = disturbed(turn=0.5, shift=0.5, mix=0.5, noise=0.5)
    inside = np.array(KINDS[0]) > 0
    np.testing.assert_array_equal(y[:, ~inside], x[:, ~inside])
    assert (np.abs(y - x)[:, inside].max(-1) > 1e-3).all()
    np.testing.assert_array_equal(*disturbed())
    np.testing.assert_array_equal(*disturbed(clean=1.0, turn=0.5, shift=0.5, mix=0.5, noise=0.5))


def test_all_slots_of_a_kind_share_one_map_and_one_shift():
    for strength in ({"turn": 0.8}, {"shift": 0.8}):
        x, y = disturbed(**strength)
        moved = y - x
        # Places 2 and 11 hold the same word in two slots of one kind, 7 and 8 in one slot.
        np.testing.assert_allclose(moved[:, 2], moved[:, 11], atol=1e-6)
        np.testing.assert_allclose(moved[:, 7], moved[:, 8], atol=1e-6)
        assert not np.allclose(moved[0], moved[1], atol=1e-3)
    x, y = disturbed(shift=0.8)
    np.testing.assert_allclose((y - x)[:, 2], (y - x)[:, 3], atol=1e-6)
    assert (
        np.linalg.norm(y - x, axis=-1) <= 0.8 * np.sqrt((x[0] ** 2).sum(-1).mean()) + 1e-4
    ).all()


def test_mixing_stays_between_two_words_and_noise_is_each_places_own():
    x, y = disturbed(mix=0.5)
    words = np.unique(x.reshape(-1, 16), axis=0)
    for place in (2, 7):
        own, made = x[0, place], y[0, place]
        off = [
            np.linalg.norm(made - own - a * (w - own))
            for w in words
            for a in np.linspace(0, 0.5, 501)
        ]
        assert min(off) < 5e-3 * np.linalg.norm(own)
    x, y = disturbed(noise=0.5)
    assert not np.allclose((y - x)[:, 7], (y - x)[:, 8], atol=1e-3)


def test_the_loss_is_that_of_the_answer_except_in_training():
    stage = dataclasses.replace(small_stage.stage(), options={})
    system = System.build(stage, mesh.make({}, jax.devices()[:1]))
    params = parameters.parameters(dataclasses.replace(system, stage=stage))
    batch, _ = next(Pipeline(stage.data, 0).iterate())
    key = jax.random.key(4)
    plain, _ = answer.loss(system.model, params, batch, key, train=True)
    for train in (False, True):
        own, metrics = slot_noise.loss(
            system.model, params, batch, key, tags=networks.TINY_TAGS, train=train
        )
        assert np.allclose(own, plain, rtol=1e-6) is not train
        assert np.allclose(metrics["perplexity"], np.exp(own), rtol=1e-6)


def test_tags_of_the_configuration_are_the_shipped_tokenizers(family):
    names = [name.capitalize() for name in networks.MODALITIES]
    found = tuple(
        tuple(family.tokenizer.encode(f"<{sign}{name}>")[-1] for sign in ("", "/"))
        for name in names
    )
    assert found == networks.TINY_TAGS


def test_a_spelled_sentence_has_a_token_for_every_character(family):
    row = {}
    for name in ("text:speech", "spelled:speech"):
        example = Example("e", ((name, "左上的物体。"),), "问", "答")
        slot = prompt.Limits(64, 32)
        made = prompt.build(
            example, family, templates.template("plain"), None, slot, np.random.default_rng(0)
        )
        inside = slot_noise.slot_kinds(jnp.asarray(made.ids[None]), networks.TINY_TAGS)[0]
        row[name] = made.ids[np.asarray(inside) == 3]
    spelled = [family.tokenizer.encode(sign)[-1] for sign in "左上的物体。"]
    # The closing tag is tokenized on its own, with a blank piece before it.
    assert row["spelled:speech"][: len(spelled)].tolist() == spelled and len(set(spelled)) == 6
    assert len(row["spelled:speech"]) == len(spelled) + 1 > len(row["text:speech"])


def test_spelling_changes_no_text_of_the_stream():
    spelled = 0
    for index in range(300):
        plain, other = text_example(1, index), text_example(1, index, spelled=0.7)
        names = [name for name, _ in other.media]
        spelled += "spelled:speech" in names
        back = tuple(
            ("text:speech", words.removesuffix("。")) if name == "spelled:speech" else (name, words)
            for name, words in other.media
        )
        assert dataclasses.replace(other, media=back) == plain
    said = sum("text:speech" in dict(text_example(1, i).media) for i in range(300))
    assert 0.5 < spelled / said < 0.9


def test_a_row_is_stretched_as_a_whole_between_the_bounds():
    x, y = disturbed(stretch=4.0)
    inside = np.array(KINDS[0]) > 0
    factors = (np.linalg.norm(y, axis=-1) / np.linalg.norm(x, axis=-1))[:, inside]
    np.testing.assert_allclose(y[:, inside], factors[..., None] * x[:, inside], rtol=1e-4)
    assert factors.min() >= 0.5 - 1e-5 and factors.max() <= 4.0 + 1e-5
    assert np.ptp(factors) > 1 and np.allclose(factors[:, 0], factors[:, -1])


def test_examples_that_hold_a_token_are_found_whole():
    ids = np.array([[1, 7, 2, 3, 3, 7], [7, 1, 1, 2, 0, 0]])
    segments = np.array([[1, 1, 1, 2, 2, 3], [1, 2, 2, 2, 0, 0]])
    found = slot_noise.tasks_with(jnp.asarray(ids), jnp.asarray(segments), (7,))
    assert found.tolist() == [[True, True, True, False, False, True], [True] + [False] * 5]


def test_instructions_to_repeat_and_no_other_beside_speech_hold_the_token(family):
    for task in ("asr", "spoken_vqa"):
        for text in (*INSTRUCTIONS[task], *UNSEEN_INSTRUCTIONS[task]):
            held = set(family.tokenizer.encode(text)) & set(networks.TINY_REPEATING)
            assert bool(held) == (task == "asr"), text
    spoken = text_example(0, 0, shares={"draw_speech": 1.0})
    assert not set(family.tokenizer.encode(spoken.instruction)) & set(networks.TINY_REPEATING)
    assert family.mask == networks.TINY_MASK


@pytest.mark.parametrize("kind, learn", [("repeat_speech", True), ("answer_speech", False)])
def test_pseudo_interfaces_learn_from_repetition_and_the_llm_from_answers(kind, learn):
    """As in stage 2, where the LLM is frozen: each task teaches one of them alone."""
    stage = world_llm_slots.get_config()
    small = small_stage.stage()
    options = {"count": 40, "shares": {kind: 1.0}, "spelled": 1.0}
    data = dataclasses.replace(small.data, sources={"text": Source("world_text", options=options)})
    stage = dataclasses.replace(small, parts=stage.parts | small.parts, data=data, options={})
    stage.parts["pseudo_interfaces"].fields["width"] = stage.parts["llm"].fields["width"]
    system = System.build(stage, mesh.make({}, jax.devices()[:1]))
    params = parameters.parameters(system)
    batch, _ = next(Pipeline(stage.data, 0).iterate())

    def loss(params):
        how = {"tags": networks.TINY_TAGS, "repeating": networks.TINY_REPEATING, "pseudo": 1.0}
        return slot_noise.loss(system.model, params, batch, jax.random.key(0), train=True, **how)[0]

    sizes = jax.tree.map(lambda x: float(jnp.abs(x).max()), jax.jit(jax.grad(loss))(params))
    largest = {part: max(jax.tree.leaves(of_part)) for part, of_part in sizes.items()}
    assert {part for part, size in largest.items() if size > 0} == {
        "pseudo_interfaces" if learn else "llm"
    }


def test_shuffled_sentences_are_words_and_characters_of_speech():
    known, changed = [*spoken_words(), *spoken_characters()], 0
    pieces = re.compile(f"(?:{'|'.join(sorted(known, key=len, reverse=True))})+")
    for index in range(200):
        plain, other = text_example(1, index), text_example(1, index, shuffled=0.6)
        if plain.task != "asr":
            assert plain == other
            continue
        changed += plain != other
        said = dict(other.media)["text:speech"]
        assert said == other.answer == other.transcript and 0 < len(said) <= 16
        if plain != other:
            assert pieces.fullmatch(said) or len(said) == 16  # which is cut off
            assert [m for m in other.media if m[0] != "text:speech"] == [
                m for m in plain.media if m[0] != "text:speech"
            ]
    assert changed > 5


def test_frames_lose_their_names_and_nothing_else():
    for index in range(40):
        one = {"shares": {"answer_clip": 1.0}}
        plain, other = text_example(1, index, **one), text_example(1, index, **one, unnamed=1.0)
        frames = dict(other.media)["text:video"].strip("。").split("。")
        named = "，".join(f"第{number}帧{words}" for number, words in zip("一二三四", frames))
        assert len(frames) == 4 and dict(plain.media)["text:video"] == f"{named}。"
        assert dataclasses.replace(other, media=plain.media) == plain


def test_hidden_words_are_embeddings_of_nothing_anew_each_time():
    stage = dataclasses.replace(small_stage.stage(), options={})
    options = {"count": 40, "shares": {"draw": 1.0}}
    sources, sizes = {"text": Source("world_text", options=options)}, {"length": 128, "answers": 64}
    data = dataclasses.replace(stage.data, sources=sources, batch_format="blank_infilling", **sizes)
    stage = dataclasses.replace(stage, data=data)
    system = System.build(stage, mesh.make({}, jax.devices()[:1]))
    params = parameters.parameters(system)
    batch, _ = next(Pipeline(stage.data, 0).iterate())
    assert (np.asarray(batch.ids) == networks.TINY_MASK).sum() > 20
    own = dict(params["llm"])
    own["embedding"] = own["embedding"].at[networks.TINY_MASK].multiply(-1.0)
    other = params | {"llm": own}

    def loss(params, key=0, **how):
        how = {"tags": networks.TINY_TAGS} | how
        return float(slot_noise.loss(system.model, params, batch, jax.random.key(key), **how)[0])

    hidden = {"hidden": networks.TINY_MASK}
    # The head knows that row, too, so that the losses are not the same to the last digit.
    unread = abs(loss(params, **hidden) - loss(other, **hidden))
    assert unread < 1e-4 < abs(loss(params) - loss(other))
    assert abs(loss(params, **hidden) - loss(params, 1, **hidden)) > 1e-4


def test_embeddings_of_nothing_are_a_twentieth_to_as_large_as_words():
    words = 0.3 * jax.random.normal(jax.random.key(1), (400, 20, 16))
    drawn = np.asarray(slot_noise.strange(words, jax.random.key(2)))
    sizes = np.sqrt(np.square(drawn).mean((1, 2))) / 0.3
    assert 0.04 < sizes.min() < 0.07 and 0.8 < sizes.max() < 1.15
    assert 0.18 < np.median(sizes) < 0.28  # the powers are uniform
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 0.2


def test_each_part_goes_on_from_the_one_before():
    configs = (world_llm, world_llm_slots, world_llm_requests)
    stages = [config.get_config() for config in configs]
    for first, second in itertools.pairwise(stages):
        assert second.init == {"llm": f"runs/{first.name}"}
        assert second.parts["llm"] == first.parts["llm"]
    seeds = [one.data.sources["text"].options.get("seed", 0) for one in stages]
    assert len(set(seeds)) == 3
