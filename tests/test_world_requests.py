"""Requests of the world: what they say, the scenes that fulfil them, and their pictures' words."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from transformers import CLIPTokenizer

from xllm_jax.configs import networks
from xllm_jax.data.batching import scene_pictures, scene_rows
from xllm_jax.data.media import image
from xllm_jax.data.synthetic_world import clip_vocabulary, language, render, requests
from xllm_jax.data.synthetic_world.scene import (
    COLORS,
    HELD_OUT,
    PLACES,
    SHAPES,
    choose,
    sample_scene,
)
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer

COUNT = 3000
RELATED = 20_000


@pytest.fixture(scope="module")
def asked() -> list[requests.Request]:
    """Requests of all kinds, pairs and wordings."""
    rng = np.random.default_rng(5)
    pairs = itertools.cycle(("seen", "unseen", "all"))
    return [requests.sample_request(rng, next(pairs), bool(i % 2)) for i in range(COUNT)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The folder of the mini text encoder's tokenizer."""
    return clip_vocabulary.write(tmp_path_factory.mktemp("clip"))


def test_a_request_and_its_scene_agree(asked):
    for request in asked:
        items = request.scene.objects
        matched = any(
            all(wanted.fits(item) for wanted, item in zip(request.objects, order))
            for order in itertools.permutations(items)
        )
        assert matched and len(items) == len(request.objects), request
        assert len({item.place for item in items}) == len(items)
        assert list(items) == sorted(items, key=lambda item: PLACES.index(item.place))


def test_its_words_name_what_is_wanted_and_nothing_else(asked):
    for request in asked:
        said = Counter(color for color in COLORS for _ in range(request.said.count(color)))
        wanted = Counter(one.color for one in request.objects)
        if len(set(request.objects)) == 1 < len(request.objects):
            assert request.said.startswith(language.NUMBERS[len(request.objects)])
            wanted = Counter(set(wanted))
        assert said == wanted, request.said
        assert sum(request.said.count(shape) for shape in SHAPES) == wanted.total()
        if request.objects[0].place:
            assert language.parse_objects(request.said) == set(request.scene.objects)


def shown_relations(request, items) -> list[str]:
    """Relations of a request's two objects in a picture of `items`."""
    centers = {(item.shape, item.color): render.cell_center(item.place) for item in items}
    first, second = (centers[one.shape, one.color] for one in request.objects)
    across, down = first[0] - second[0], first[1] - second[1]
    truth = {"左边": across < 0, "右边": across > 0, "上面": down < 0, "下面": down > 0}
    return [name for name, holds in truth.items() if holds]


def test_relations_hold_in_the_picture(asked):
    seen = Counter()
    for request in filter(lambda one: one.relation, asked):
        assert shown_relations(request, request.scene.objects) == [request.relation]
        order = [request.said.index(one.color + one.shape) for one in request.objects]
        assert order[0] < order[1] or request.said.count(request.objects[0].color) > 1
        seen[request.relation] += 1
    assert seen.keys() == set(requests.RELATIONS) and min(seen.values()) > 100


def test_a_caption_says_all_of_a_picture_that_fulfils_the_request(asked):
    for request in asked:
        caption = requests.caption(request)
        clauses = caption.split("，")
        items = [next(iter(language.parse_objects(clause))) for clause in clauses]
        assert items == sorted(items, key=lambda item: PLACES.index(item.place))
        assert len({item.place for item in items}) == len(items) == len(request.objects)
        assert any(
            all(wanted.fits(item) for wanted, item in zip(request.objects, order))
            for order in itertools.permutations(items)
        ), (request.said, caption)
        if request.relation:
            assert shown_relations(request, items) == [request.relation]
        if request.kind in ("plain", "repeated"):  # in the order of the request
            words = [item.color + item.shape for item in items]
            told = re.findall(f"(?:{'|'.join(COLORS)})(?:{'|'.join(SHAPES)})", request.said)
            assert words == (told * len(words) if request.kind == "repeated" else told)
        assert all(item.size == "大" for item in items if item.size not in request.said)


def test_an_edit_changes_the_colors_alone():
    rng = np.random.default_rng(3)
    for _ in range(200):
        scene, color = sample_scene(rng, "all"), choose(rng, COLORS)
        request = requests.recolored(scene, color)
        told = language.parse_objects(requests.caption(request))
        assert told == {dataclasses.replace(item, color=color) for item in scene.objects}
        assert told == set(request.scene.objects)


def test_a_relation_is_always_found():
    rng = np.random.default_rng(9)
    cells = set()
    for _ in range(RELATED):
        request = requests.sample_request(rng, shares={"related": 1.0})
        cells.add(tuple(item.place for item in request.scene.objects))
    # Side by side or one above the other: 3 lines of 3 pairs of cells, both ways.
    assert len(cells) == 18


def test_pairs_are_held_out_where_asked():
    rng = np.random.default_rng(1)
    for _ in range(300):
        seen, unseen = (requests.sample_request(rng, pairs) for pairs in ("seen", "unseen"))
        assert not any(item.pair in HELD_OUT for item in seen.scene.objects)
        assert any(item.pair in HELD_OUT for item in unseen.scene.objects)


def test_every_word_of_a_request_is_known_to_the_text_encoder(asked, tokenizer):
    published = CLIPTokenizer.from_pretrained(tokenizer)
    ours = ClipTokenizer(tokenizer)
    assert len(published) == networks.TINY_CAPTION_VOCABULARY
    texts = [*(one.said for one in asked), *map(requests.caption, asked)]
    ids = ours.encode(texts, networks.TINY_CAPTION)
    for text, row in zip(texts, ids):
        words = ours.words(row)
        assert "".join(map(ours.piece, words)).replace(" ", "") == text
        assert row[len(words) + 1] == ours.end
    # Colors and shapes are words of their own: a pair never seen is two words that are known.
    pieces = {ours.piece(int(token)).strip() for token in np.unique(ids)}
    assert {*COLORS, *SHAPES} <= pieces
    assert not any(shape in piece and shape != piece for piece in pieces for shape in SHAPES)


def test_a_key_gives_the_same_picture_and_words_each_time():
    for index in range(5):
        first, second = (scene_rows.asked_for(f"3-{index}") for _ in range(2))
        assert first == second
        drawn = scene_pictures.picture(first[0], 96)
        np.testing.assert_array_equal(drawn, scene_pictures.picture(second[0], 96))
    told = [scene_rows.asked_for(f"4-{index}")[1] for index in range(2000)]
    assert 0.07 < 1 - np.mean(told) < 0.13


def test_pictures_from_minus_one_to_one_are_the_pixels_again():
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    signed = image.to_signed(pixels)
    assert signed.dtype == np.float32 and signed.min() == -1 and signed.max() == 1
    np.testing.assert_array_equal(image.from_signed(signed), pixels)
    np.testing.assert_array_equal(image.from_signed(np.float32([-3, 3])), [0, 255])


def test_pictures_have_no_grain(asked):
    for request in asked[:200]:
        assert request.scene.background == requests.SMOOTH
