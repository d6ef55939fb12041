"""What the mini text encoder is pre-trained on: words, and what stands in each place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xllm_jax.assembly.networks import model as networks_of
from xllm_jax.assembly.system import System
from xllm_jax.configs import world_text_encoder, world_text_places
from xllm_jax.core import mesh
from xllm_jax.core.batch import DescribedScenes
from xllm_jax.data.batching import batch_format, scene_descriptions, scene_pictures, scene_rows
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record
from xllm_jax.data.synthetic_world import clip_vocabulary
from xllm_jax.data.synthetic_world.scene import ALL_PAIRS, PLACES, SIZES, Object, Scene
from xllm_jax.evaluation import scene_reader
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import text_to_scene
from xllm_jax.training.trainer import Trainer


def test_every_object_has_a_class_of_its_own_in_its_place():
    seen = set()
    for pair in ALL_PAIRS:
        for size in SIZES:
            for place in PLACES:
                item = Object(*pair, size, place)
                found = scene_descriptions.classes(Scene((item,), "gradient", 0))
                assert np.flatnonzero(found).tolist() == [PLACES.index(place)]
                seen.add((pair, size, int(found.max())))
    classes = {number for *_, number in seen}
    assert len(seen) == len(classes) == 60
    assert classes == {*range(1, scene_descriptions.CLASSES)}


def test_classes_are_what_a_reader_of_pictures_sees():
    """The judge of drawings looks at the picture of the same key, and knows no class."""
    for number in range(12):
        request, _ = scene_rows.asked_for(f"5-{number}")
        drawn = scene_pictures.picture(request, scene_reader.SIDE)
        seen = scene_reader.read(np.uint8(np.round(127.5 * (drawn + 1))))
        wanted = scene_descriptions.classes(request.scene)
        found = scene_descriptions.classes(Scene(tuple(one.item for one in seen), "gradient", 0))
        np.testing.assert_array_equal(found, wanted)


class Words(nn.Module):
    """The text is its ids."""

    def states(self, ids):
        return ids.astype(jnp.float32)


class Reader(nn.Module):
    """Says that the first place shows what the first number is, and the others nothing."""

    sure: float

    def __call__(self, states):
        first = jax.nn.one_hot(states[:, :1].astype(jnp.int32), 4)
        rest = jax.nn.one_hot(jnp.zeros((len(states), 2), jnp.int32), 4)
        return self.sure * jnp.concatenate([first, rest], axis=1)


def test_the_loss_is_the_mean_surprise_over_places():
    ids = np.array([[1, 9], [2, 9]], np.int32)
    places = np.array([[1, 0, 0], [3, 0, 1]], np.int32)
    xllm = XLLM(networks={"text_encoder": Words(), "scene_head": Reader(2.0)})
    params = {"text_encoder": {}, "scene_head": {}}
    value, metrics = text_to_scene.loss(xllm, params, DescribedScenes(ids, places))
    rest = np.log(np.exp(2.0) + 3)
    assert float(value) == pytest.approx((4 * (rest - 2) + 2 * rest) / 6, rel=1e-5)
    assert float(metrics["place_accuracy"]) == pytest.approx(4 / 6)
    assert float(metrics["object_accuracy"]) == pytest.approx(1 / 3)


def test_words_are_those_of_the_pictures_or_mostly_name_places(tmp_path):
    stage = world_text_encoder.get_config()
    stage.data.caption_tokenizer = str(clip_vocabulary.write(tmp_path / "clip"))
    form, size = batch_format.find(stage.data), stage.data.examples
    found = {}
    for task in ("attributes", "places"):
        records = [Record(Example(f"3-{i}", task=task), "s", 0, i, 0) for i in range(size)]
        found[task], _ = form.fill(form.plan(records, Mode()), slice(None), Mode())
    asked = [scene_rows.asked_for(f"3-{i}") for i in range(size)]
    said = [request.said if told else "" for request, told in asked]
    wanted = [scene_descriptions.classes(request.scene) for request, _ in asked]
    np.testing.assert_array_equal(found["attributes"].places, wanted)
    tokenizer = form.resources
    length = stage.data.caption_length
    np.testing.assert_array_equal(found["attributes"].ids, tokenizer.encode(said, length))
    # Words with places are longer than any others.
    long = {
        task: (batch.ids != tokenizer.encode([""], length)[0, -1]).sum(1).mean()
        for task, batch in found.items()
    }
    assert long["places"] > 1.2 * long["attributes"]


@pytest.mark.parametrize("config", [world_text_encoder, world_text_places])
def test_its_stages_learn_what_stands_where(config, tmp_path):
    """Sixty steps on four descriptions; a fresh one knows none of their objects."""
    stage = config.get_config()
    stage.init = {}
    stage.parts["text_encoder"].fields["depth"] = 1
    stage.data.caption_tokenizer = str(clip_vocabulary.write(tmp_path / "clip"))
    stage.data.examples, stage.unroll, stage.optimizer.warmup_steps = 4, 1, 0
    form = batch_format.find(stage.data)
    told = [i for i in range(40) if "大" in scene_rows.asked_for(f"3-{i}")[0].said][:4]
    records = [Record(Example(f"3-{i}"), "s", 0, i, 0) for i in told]
    batch, _ = form.fill(form.plan(records, Mode()), slice(None), Mode())
    made = Trainer(System.build(stage, mesh.make({}, jax.devices()[:1])))
    assert networks_of(stage).networks["scene_head"].classes == scene_descriptions.CLASSES  # pyright: ignore
    state = made.initial_state()
    assert state.trainable.keys() == {"text_encoder", "scene_head"}
    state, first = made.step(state, batch)
    for _ in range(60):
        state, last = made.step(state, batch)
    assert float(last["object_accuracy"]) > 0.9 > 0.5 > float(first["object_accuracy"])
