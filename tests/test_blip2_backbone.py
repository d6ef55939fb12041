"""The shipped BLIP-2 of the miniature: LAVIS' names, and more than a fresh Q-Former knows."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.assembly.networks import model
from xllm_jax.configs import world_blip2
from xllm_jax.convert import files, sizes
from xllm_jax.convert.sources import world
from xllm_jax.core import checkpoint, rules
from xllm_jax.data.synthetic_world.scene import COLORS, SHAPES

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import vision_probe

SHIPPED = vision_probe.SHIPPED.parent / "blip2_stage2"


@pytest.fixture(scope="module")
def interface():
    return model(world_blip2.get_config()).networks["image_interface"]


@pytest.fixture(scope="module")
def shipped(interface, tmp_path_factory):
    """Parameters of the base that everybody's stage 2 begins with."""
    folder = tmp_path_factory.mktemp("bases") / "blip2_stage2"
    world.import_blip2(interface, SHIPPED, folder)
    return parameters(folder)


def parameters(folder):
    read = {path: x.read().result() for path, x in checkpoint.open_leaves(folder).items()}
    return rules.unflatten(read)["image_interface"]


def told(interface, params):
    """Share of colors and shapes, present or not, that ridge regression reads from the queries.

    Asked about scenes with a held-out pair, fitted to others.
    """
    embed = jax.jit(lambda x: interface.apply({"params": params}, x, jnp.full(len(x), 36))[0])
    inputs, truth = [], []
    for pairs, count in (("seen", 600), ("unseen", 200)):
        drawn = vision_probe.scenes(pairs, count)
        embeddings = np.asarray(embed(vision_probe.features(drawn)[0]))
        inputs.append(embeddings.reshape(count, -1))
        shown = [{word for item in scene.objects for word in item.pair} for scene in drawn]
        truth.append([[word in words for word in (*COLORS, *SHAPES)] for words in shown])
    middle, spread = inputs[0].mean(0), inputs[0].std(0) + 1e-6
    known, asked = ((x - middle) / spread for x in inputs)
    target = np.asarray(truth[0], float)
    kernel = known @ known.T + known.shape[-1] * np.eye(len(known))
    scores = asked @ known.T @ np.linalg.solve(kernel, target - target.mean(0)) + target.mean(0)
    return ((scores > 0.5) == np.asarray(truth[1])).mean()


def test_what_is_exported_comes_back_bit_by_bit(interface, tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda x: rng.standard_normal(x.shape).astype(np.float16).astype(np.float32)  # noqa: E731
    params = jax.tree.map(draw, sizes.shapes_of(interface))
    world.export_blip2(interface, params, tmp_path / "published")
    world.import_blip2(interface, tmp_path / "published", tmp_path / "base")
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path / "base"), params)


def test_names_are_those_of_the_published_file():
    names = set(files.open_checkpoint(SHIPPED))
    layer = "Qformer.bert.encoder.layer.0"
    assert {"query_tokens", "ln_vision.weight", "opt_proj.weight"} <= names
    assert {f"{layer}.attention.self.query.weight", f"{layer}.output_query.dense.bias"} <= names


def test_its_queries_tell_objects_that_a_fresh_one_does_not(interface, shipped):
    """Which colors and shapes stand in a scene, read from its queries by ridge regression."""
    fresh = interface.init(jax.random.key(1), jnp.zeros((1, 36, 96)), jnp.full(1, 36))["params"]
    learned, begun = (told(interface, params) for params in (shipped, fresh))
    assert learned > 0.94 and learned > begun + 0.05
