"""What the mini vision encoder is pre-trained on: labels, other colors, and the loss on them."""

import colorsys

import numpy as np
import pytest

from xllm_jax.data.batching import scene_attributes
from xllm_jax.data.synthetic_world import render
from xllm_jax.data.synthetic_world.scene import (
    COLORS,
    HELD_OUT,
    PLACES,
    SEEN_PAIRS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    generator,
)
from xllm_jax.objectives.attributes import classification


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_is_drawn_in_a_color_near_the_one_held_out(shape):
    rng = generator(0, "colors", shape)
    drawn = np.array([scene_attributes.any_color(shape, rng) for _ in range(500)]) / 255
    (held_out,) = (color for kind, color in HELD_OUT if kind == shape)
    hues = np.array([colorsys.rgb_to_hsv(*rgb)[0] for rgb in drawn])
    # Whole numbers round the hue of what is almost gray.
    clear = hues[np.ptp(drawn, axis=1) > 0.1]
    for _ in range(50):
        rgb = render.jitter_color(held_out, rng)
        hue = colorsys.rgb_to_hsv(*(x / 255 for x in rgb))[0]
        apart = np.abs((clear - hue + 0.5) % 1 - 0.5)
        assert apart.min() > 0.035  # 0.06 less what the color itself is moved by
    assert drawn.max(1).min() > 0.64, "as bright as no background"
    assert np.ptp(hues) > 0.7 and np.ptp(drawn.min(1) / drawn.max(1)) > 0.9, "colors of all kinds"


def test_most_scenes_have_other_colors_that_no_label_tells():
    asked = []
    for index in range(200):
        _, patches, cells, colors = scene_attributes.draw(f"3-{index}", 96, 6)
        assert ((colors > 0).any(-1) == (patches[:, 0] > 0)).all()
        for labels in (patches, cells):
            there = labels[:, 0] > 0
            assert there.any() and (labels[~there] == 0).all()
            assert (labels[there, 0] <= len(SHAPES)).all() and (labels[there, 2] > 0).all()
            told = labels[there, 1]
            assert (told == scene_attributes.NOT_ASKED).all() or (told > 0).all()
            assert told.max() <= len(COLORS)
        asked.append(bool((patches[:, 1] != scene_attributes.NOT_ASKED).all()))
    assert 30 < sum(asked) < 70


@pytest.mark.parametrize("size", SIZES)
def test_every_object_has_patches_and_they_show_it(size):
    """Also a small one in the corner of four patches, whose centers it does not cover."""
    for seed, (shape, color) in enumerate(SEEN_PAIRS):
        scene = Scene((Object(shape, color, size, PLACES[seed % 9]),), "noise", seed)
        labels = scene_attributes.patch_labels(scene, 6).reshape(6, 6, 4)
        told = [SHAPES.index(shape), COLORS.index(color), SIZES.index(size), seed % 9]
        own = labels[..., 0] > 0
        assert (labels[own] == np.array(told) + 1).all()
        assert own.sum() == 4 and covered(scene, render.sprites(scene), own) > 0.9


def covered(scene, items, own):
    """Share of a single object that the patches show, by what changes in the picture with it.

    0 where one of them shows nothing of it.
    """
    ((shape, x, y, radius, _, turn),) = items
    two = [
        np.asarray(render.render_scene(scene, 96, False, [(shape, x, y, radius, rgb, turn)]))
        for rgb in ((255, 255, 255), (0, 0, 0))
    ]
    apart = np.abs(two[0].astype(int) - two[1]).sum(-1) > 200
    area = apart.reshape(6, 16, 6, 16).sum((1, 3))
    return area[own].sum() / area.sum() if area[own].min() > 0 else 0.0


def test_objects_of_any_look_are_where_their_labels_say():
    rng = generator(0, "looks")
    scene = Scene((Object("圆形", "蓝色", "大", "左边"),), "noise", 3)
    places, sizes = set(), set()
    for _ in range(60):
        item = scene_attributes.any_look(render.sprites(scene)[0], rng, True)
        shape, color, size, place = scene_attributes.classes(item, scene_attributes.NOT_ASKED)
        assert (SHAPES[shape - 1], color) == ("圆形", scene_attributes.NOT_ASKED)
        _, x, y, radius, *_ = item
        nearest = min(
            PLACES, key=lambda name: np.hypot(*np.subtract(render.cell_center(name), (x, y)))
        )
        assert PLACES[place - 1] == nearest
        own_size = min(SIZES, key=lambda name: abs(render.RADIUS[name] - radius))
        assert SIZES[size - 1] == own_size
        assert covered(scene, [item], scene_attributes.owners([item], 6).reshape(6, 6) > 0) > 0.6
        places.add(nearest), sizes.add(own_size)
    assert "左边" in places and len(sizes) == 2


def test_what_is_not_asked_has_no_loss():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((4, 7, 16)).astype(np.float32)
    labels = np.stack([rng.integers(0, n, (4, 7)) for n in (6, 7, 3)], -1).astype(np.int32)
    labels[0, :, 1] = labels[2, 3, 0] = scene_attributes.NOT_ASKED
    loss, right = 0.0, np.ones((4, 7), bool)
    for i, (start, end) in enumerate(((0, 6), (6, 13), (13, 16))):
        part = scores[..., start:end].astype(np.float64)
        chances = np.log(np.exp(part) / np.exp(part).sum(-1, keepdims=True))
        for place in np.ndindex(4, 7):
            if labels[*place, i] >= 0:
                loss -= chances[*place, labels[*place, i]] / 28
                right[place] &= part[place].argmax() == labels[*place, i]
    found, accuracy = classification(scores, labels, (6, 7, 3))
    np.testing.assert_allclose(found, loss, rtol=1e-6)
    np.testing.assert_allclose(accuracy, right.mean(), rtol=1e-6)
