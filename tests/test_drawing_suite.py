"""Pictures of known truth through the suite that judges drawings."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import soundfile

from xllm_jax.core.errors import UserError
from xllm_jax.data.batching import scene_pictures
from xllm_jax.data.media import image, speech
from xllm_jax.data.sources import world_edits, world_requests
from xllm_jax.data.synthetic_world import plan
from xllm_jax.data.synthetic_world.requests import Request
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


def test_the_ceilings_pictures_stand_beside_the_answers(examples, tmp_path):
    found = drawing_suite.run(
        "Requests",
        examples,
        lambda asked: [None] * len(asked),
        tmp_path,
        {drawing_suite.CEILING: truth},
    )
    looks = found["metrics"]["looks"]
    assert looks["ceiling_scores"] == [1.0] * COUNT and looks["ceiling"]["value"] == 1
    assert all(entry["ceiling"] and not entry["drawn"] for entry in found["shown"])
    shown = page.samples(found, {})
    assert shown.count("<img") == shown.count("<figcaption>ceiling") == len(found["shown"])
    for entry in found["shown"]:  # the caption, which is what was to be drawn
        assert entry["reference"] in shown


def scored(keys, **scores):
    """What `run` would return of these scores."""
    metrics = {"scores": scores["own"], "ceiling_scores": scores.get("ceiling")}
    kept = {name: values for name, values in metrics.items() if values is not None}
    return {"keys": keys, "metrics": {"looks": kept}}


def test_answers_are_compared_with_shares_of_the_ceiling_and_of_the_written():
    keys = [str(number) for number in range(10)]
    written = scored(keys, own=[1.0] * 9 + [0.0], ceiling=[1.0] * 10)
    # Of what was said aloud as well, eight were right in writing and seven by voice.
    spoken = scored(keys[1:], own=[1.0] * 7 + [0.0] * 2)
    found = drawing_suite.comparisons({"drawing": written, "drawing_spoken": spoken})
    assert found["drawing_ceiling"]["value"] == pytest.approx(0.9 - 0.9 * 1.0, abs=1e-6)
    assert found["drawing_spoken"]["value"] == pytest.approx((7 - 0.85 * 8) / 9, abs=1e-6)
    assert found["drawing_spoken"]["samples"] == 9
    assert {one["metric"] for one in found.values()} == {"looks"}
    assert found["drawing_spoken"]["low"] < found["drawing_spoken"]["value"]
    alone = drawing_suite.comparisons({"drawing": scored(keys, own=[1.0] * 10)})
    assert alone == {}


@pytest.fixture
def world(tmp_path):
    """The folder of a world of ten pictures a split, without the pictures."""
    sizes = {f"{split}_images": 10 for split in plan.SPLITS}
    (tmp_path / "world.json").write_text(json.dumps({"seed": 3, "sizes": sizes}))
    return tmp_path


def test_an_edit_asks_for_all_but_the_color_of_its_picture(world):
    asked = drawing_suite.edits(str(world), 8)
    assert len(asked) == 8
    for example in asked:
        number = int(example.key.split("-")[-1])
        before = plan.picture(3, "test", number)
        assert example.media == (("image", str(world / "coco/test" / before.file_name)),)
        request = drawing_suite.asked_for(example)
        (color,) = {wanted.color for wanted in request.objects}
        assert color in example.instruction and color not in {
            item.color for item in before.scene.objects
        }
        again = [dataclasses.replace(item, color=color) for item in before.scene.objects]
        assert list(request.scene.objects) == again
        assert ("unseen_pair" in example.tags) == any(item.pair not in SEEN_PAIRS for item in again)
        assert example.outputs[0][1].count(color) == len(again)


def test_the_edited_picture_is_right_and_the_one_shown_is_not(world):
    asked = drawing_suite.edits(str(world))

    def drawn(scene):
        shown = Request((), "", dataclasses.replace(scene, background="gradient"))
        return image.from_signed(scene_pictures.picture(shown, 96))

    edited = [drawn(drawing_suite.asked_for(example).scene) for example in asked]
    shown = [drawn(plan.scene(3, "test", int(e.key.split("-")[-1]))) for e in asked]
    right = drawing_suite.scores(edited, asked)
    assert right["looks"].samples.all() and right["places"].samples.all()
    assert not drawing_suite.scores(shown, asked)["looks"].samples.any()


def test_training_edits_know_seen_pairs_alone(world):
    (world / "world.json").write_text('{"seed": 3, "sizes": {"train_images": 400}}')
    made = world_edits.examples(str(world), "train")
    pairs = {
        item.pair
        for i in range(len(made))
        for item in world_edits.asked_for(made[i].key).scene.objects
    }
    assert pairs and pairs <= set(SEEN_PAIRS)


def test_an_edit_may_say_its_caption_before_the_picture(world):
    plain, said = (world_edits.examples(str(world), "test", echo=echo)[3] for echo in (False, True))
    assert plain.answer == "<image>"
    assert said.answer == f"{said.outputs[0][1]} <image>" and said.outputs == plain.outputs


def test_edits_of_no_world_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no world\.json"):
        world_edits.examples(str(tmp_path))
    with pytest.raises(UserError, match="unknown split 'dev'"):
        world_edits.examples(str(tmp_path), "dev")
    (tmp_path / "world.json").write_text('{"seed": 3}')
    with pytest.raises(UserError, match=r"world\.json"):
        world_edits.examples(str(tmp_path))


def test_requests_that_are_too_long_to_be_heard_are_left_out(examples, tmp_path):
    """A request of 448 frames once ended the evaluation of a run that takes 416."""
    every = drawing_suite.spoken(examples[:12], tmp_path / "all", 10_000)
    assert [one.key for one in every] == [one.key for one in examples[:12]]
    lengths = [soundfile.info(one.media[0][1]).frames for one in every]
    frames = sorted(map(speech.frames_of, lengths))[6]
    fits = [one.key for one, n in zip(every, lengths) if speech.frames_of(n) <= frames]
    some = drawing_suite.spoken(examples[:12], tmp_path / "some", frames)
    assert [one.key for one in some] == fits and 0 < len(fits) < 12
    assert {f.stem for f in (tmp_path / "some").iterdir()} == set(fits)
