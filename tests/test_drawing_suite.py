"""Pictures of known truth through the suite that judges drawings."""

from __future__ import annotations

import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.data.batching import scene_pictures
from xllm_jax.data.media import image
from xllm_jax.data.sources import world_requests
from xllm_jax.data.synthetic_world.scene import SEEN_PAIRS
from xllm_jax.evaluation import drawing_suite
from xllm_jax.report import page

COUNT = 40


@pytest.fixture(scope="module")
def examples():
    return drawing_suite.requests(COUNT)


def truth(examples):
    """What a perfect decoder would draw."""
    asked = [world_requests.asked_for(example.key) for example in examples]
    return [image.from_signed(scene_pictures.picture(request, 96)) for request in asked]


def test_true_pictures_are_right_and_others_are_not(examples, tmp_path):
    found = drawing_suite.run(
        "Requests", examples, truth, tmp_path, {"nothing": lambda ex: [None] * len(ex)}
    )
    looks, places = found["metrics"]["looks"], found["metrics"]["places"]
    assert looks["value"] == places["value"] == 1
    assert looks["nothing"]["value"] == places["nothing"]["value"] == 0
    assert looks["shuffled"]["value"] <= 0.03
    named = [e for e in examples if drawing_suite.names_place(e)]
    assert places["samples"] == COUNT and 0 < len(named) < COUNT
    assert sum(places["scores"]) == len(named)
    assert {"plain", "placed", "related", "unseen_pair", "seen"} <= looks["groups"].keys()


def test_half_of_what_is_shown_are_failures_and_pictures_are_on_the_page(examples, tmp_path):
    def half(examples):
        return [one if number % 2 else None for number, one in enumerate(truth(examples))]

    found = drawing_suite.run("Requests", examples, half, tmp_path)
    assert found["metrics"]["looks"]["value"] == 0.5
    shown = found["shown"]
    assert [entry["right"] for entry in shown].count(False) == len(shown) // 2
    assert all(bool(entry["drawn"]) == entry["right"] for entry in shown)
    assert page.samples(found, {}).count("<img") == len(shown) // 2


def test_training_requests_know_seen_pairs_alone_and_splits_differ():
    train = [world_requests.asked_for(e.key) for e in world_requests.examples(count=300)]
    pairs = {item.pair for request in train for item in request.scene.objects}
    assert pairs <= set(SEEN_PAIRS)
    test = world_requests.examples(split="test", count=300)
    unseen = np.mean([world_requests.asked_for(e.key).unseen for e in test])
    assert 0.35 < unseen < 0.65
    assert not {request.said for request in train if request.kind == "placed"} & {
        e.outputs[0][1] for e in test
    }
    again = world_requests.examples(split="test", count=300)
    assert [e.instruction for e in again] == [e.instruction for e in test]


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="unknown split 'dev'"):
        world_requests.examples(split="dev")
