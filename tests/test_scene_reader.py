"""The judge of drawings, on scenes that are known: right there, and wrong on others' truth."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
import scipy.ndimage

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import image
from xllm_jax.data.synthetic_world import render, requests
from xllm_jax.data.synthetic_world.requests import Wanted
from xllm_jax.data.synthetic_world.scene import (
    BACKGROUNDS,
    COLORS,
    PLACES,
    SHAPES,
    SIZES,
    Object,
    Scene,
    sample_scene,
)
from xllm_jax.evaluation import scene_reader

COUNT = 2000


def drawn(scene: Scene) -> np.ndarray:
    """The picture of a scene as models see it, `[96, 96, 3]` uint8."""
    return image.resize(render.render_scene(scene), scene_reader.SIDE)


def blurred(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As an autoencoder gives it back: softer, with noise of its own."""
    soft = scipy.ndimage.gaussian_filter(picture.astype(np.float64), (0.8, 0.8, 0))
    return np.clip(np.rint(soft + 8 * rng.standard_normal(soft.shape)), 0, 255).astype(np.uint8)


def read(picture: np.ndarray) -> tuple[Object, ...]:
    return tuple(one.item for one in scene_reader.read(picture))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = np.random.default_rng(11)
    pairs = itertools.cycle(("seen", "unseen", "all"))
    return [sample_scene(rng, next(pairs)) for _ in range(COUNT)]


@pytest.fixture(scope="module")
def readings(scenes) -> list[tuple[Object, ...]]:
    return [read(drawn(scene)) for scene in scenes]


def test_it_reads_rendered_scenes(scenes, readings):
    right = [found == scene.objects for found, scene in zip(readings, scenes)]
    assert np.mean(right) >= 0.99
    seen = Counter(value for s in scenes for o in s.objects for value in dataclasses.astuple(o))
    assert all(seen[word] > 100 for word in (*SHAPES, *COLORS, *SIZES, *PLACES))
    assert Counter(scene.background for scene in scenes).keys() == set(BACKGROUNDS)
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3}


def test_it_does_not_agree_with_shuffled_truth(scenes, readings):
    others = scenes[1:] + scenes[:1]
    looks = [
        scene_reader.compare(other.objects, as_seen(found)).looks
        for found, other in zip(readings, others)
    ]
    assert np.mean(looks) <= 0.03
    assert np.mean([found == other.objects for found, other in zip(readings, others)]) <= 0.03


def as_seen(items: tuple[Object, ...]) -> list[scene_reader.Seen]:
    """Objects in the middle of their cells."""
    centers = (render.cell_center(item.place) for item in items)
    return [scene_reader.Seen(item, x, y, 0.1, 0.0) for item, (x, y) in zip(items, centers)]


def test_it_reads_through_blur_and_noise(scenes):
    rng = np.random.default_rng(2)
    some = scenes[:400]
    right = [read(blurred(drawn(scene), rng)) == scene.objects for scene in some]
    assert np.mean(right) >= 0.98


def test_every_neighbor_of_the_same_color_is_told_apart():
    """Large objects of one color in neighboring cells touch each other."""
    right = []
    for seed, ((first, second), (one, other)) in enumerate(
        itertools.product(itertools.product(SHAPES, SHAPES), (("左上", "上面"), ("中间", "下面")))
    ):
        objects = (Object(first, "绿色", "大", one), Object(second, "绿色", "大", other))
        right.append(read(drawn(Scene(objects, "gradient", seed))) == objects)
    assert np.mean(right) >= 0.98


def test_what_is_no_scene_shows_nothing():
    rng = np.random.default_rng(3)
    for background in BACKGROUNDS:
        assert read(drawn(Scene((), background, int(rng.integers(1000))))) == ()
    noise = rng.integers(0, 256, (96, 96, 3)).astype(np.uint8)
    assert read(noise) == () and read(np.zeros((64, 64, 3), np.uint8)) == ()


def test_other_sizes_are_read_too(scenes):
    for scene in scenes[:20]:
        assert read(np.asarray(render.render_scene(scene))) == scene.objects


def test_what_is_no_picture_is_refused():
    with pytest.raises(UserError, match=r"picture: is float32 \(96, 96, 3\)"):
        scene_reader.read(np.zeros((96, 96, 3), np.float32))
    with pytest.raises(UserError, match="unknown relation"):
        scene_reader.compare((), (), "里面")


CIRCLE, SQUARE = Object("圆形", "红色", "大", "左边"), Object("方形", "蓝色", "小", "右边")
SHOWN = drawn(Scene((CIRCLE, SQUARE), "clouds", 5))


@pytest.mark.parametrize(
    "wanted, relation, wrong",
    [
        ([Wanted("圆形", "红色"), Wanted("方形", "蓝色")], "左边", ()),
        ([Wanted("方形", "蓝色"), Wanted("圆形", "红色")], "右边", ()),
        ([Wanted("圆形", "红色"), Wanted("方形", "蓝色")], "上面", ("relation",)),
        ([Wanted("圆形", "红色", "大"), Wanted("方形", "蓝色")], "", ()),
        ([Wanted("圆形", "红色", "小"), Wanted("方形", "蓝色")], "", ("sizes",)),
        ([Wanted("圆形", "红色", "", "右边"), Wanted("方形", "蓝色")], "", ("places",)),
        ([Wanted("圆形", "蓝色"), Wanted("方形", "红色")], "", ("looks",)),
        ([Wanted("圆形", "红色"), Wanted("方形", "绿色")], "", ("colors", "looks")),
        ([Wanted("圆形", "红色"), Wanted("星形", "蓝色")], "", ("shapes", "looks")),
        ([Wanted("圆形", "红色")], "", ("count", "shapes", "colors", "looks")),
        ([Wanted("圆形", "红色")] * 2, "", ("shapes", "colors", "looks")),
    ],
)
def test_the_verdict_names_what_does_not_hold(wanted, relation, wrong):
    verdict = scene_reader.compare(wanted, scene_reader.read(SHOWN), relation)
    found = dataclasses.asdict(verdict)
    assert {name for name, holds in found.items() if holds is False} == set(wrong)
    assert verdict.all == (not wrong)
    assert (found["relation"] is None) == (not relation)
    assert (found["sizes"] is None) == (not any(one.size for one in wanted))


def test_requests_hold_in_their_own_scenes_and_not_in_others():
    rng = np.random.default_rng(4)
    asked = [requests.sample_request(rng, "all", bool(i % 2)) for i in range(400)]
    pictures = [drawn(request.scene) for request in asked]
    own = [scene_reader.judge(*pair) for pair in zip(asked, pictures)]
    assert np.mean([verdict.all for verdict in own]) >= 0.99
    assert sum(verdict.relation is not None for verdict in own) > 50
    others = [scene_reader.judge(*pair) for pair in zip(asked[1:] + asked[:1], pictures)]
    assert np.mean([verdict.looks for verdict in others]) <= 0.03
