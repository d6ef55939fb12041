"""What `xllm evaluate` says of stage 1, image, beside the stage's own objective."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from xllm_jax.assembly import parameters
from xllm_jax.assembly.system import System
from xllm_jax.configs import stage1_image
from xllm_jax.core import mesh
from xllm_jax.data import synthetic_world
from xllm_jax.data.synthetic_world import build
from xllm_jax.data.synthetic_world.plan import WorldSizes
from xllm_jax.evaluation import demo_suite
from xllm_jax.inference.load_run import Restored
from xllm_jax.launch import evaluate_pairs
from xllm_jax.objectives import blip2_pretraining

BACKBONES = Path(synthetic_world.__file__).parent / "backbones"
PAIRS = 24  # fewer than a batch has rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    sizes = {field.name: PAIRS for field in dataclasses.fields(WorldSizes)}
    return build.build(tmp_path_factory.mktemp("world") / "world", WorldSizes(**sizes), workers=0)


@pytest.fixture(scope="module")
def restored():
    stage = stage1_image.get_config("tiny")
    vocabulary = BACKBONES / "bert" / "vocab.txt"
    data = dataclasses.replace(stage.data, vocabulary=str(vocabulary), threads=1)
    stage = dataclasses.replace(stage, data=data, init={}, unroll=1)
    system = System.build(stage, mesh.make({}, jax.devices()[:1]))
    return Restored(system.model, parameters.parameters(system), stage)


def objective(model, params, batch):
    """Metrics of the objective, whose negatives are those that the figures are about."""
    encoder, part = model.parts("image")
    network, own = model.networks[part], {"params": params[part]}
    features, _ = model.apply(params, encoder, batch.images, None)
    image = network.apply(own, features, method="normalize")
    units = network.apply(own, image, method="image")[1]
    texts = network.apply(own, batch.ids, batch.mask, method="text")[1][:, 0]
    similar = blip2_pretraining.similarities(units, texts, params[part]["temperature"])
    drawn = blip2_pretraining.sample_negatives(jax.random.key(0), *similar, "xllm", batch.weights)
    given = (network, params[part], features, batch.ids, batch.mask)
    return blip2_pretraining.pair_loss(*given, weights=batch.weights, negatives=drawn)[1]


def test_the_figures_are_those_of_the_objective_on_the_same_pairs(root, restored):
    found = evaluate_pairs.evaluate(restored, str(root), demo_suite.SOURCES["caption"], PAIRS)
    count = found["samples"]
    assert 10 < count <= PAIRS and len(found["keys"]) == count
    values = {name: metric["value"] for name, metric in found["metrics"].items()}
    assert all(metric["samples"] == count for metric in found["metrics"].values())

    source = demo_suite.SOURCES["caption"]
    (batch,) = evaluate_pairs.batches(restored, str(root), source, PAIRS)
    assert batch.weights.sum() == count
    metrics = jax.jit(functools.partial(objective, restored.model))(restored.params, batch)
    assert values["itm"] == pytest.approx(float(metrics["itm_accuracy"]), abs=1e-4)
    both = (values["r1_text"] + values["r1_image"]) / 2
    assert both == pytest.approx(float(metrics["itc_accuracy"]), abs=1e-4)
    lengths = np.asarray(batch.mask)[:, 1:].sum(1)[np.asarray(batch.weights) > 0]
    itg = np.asarray(found["metrics"]["itg"]["scores"])
    assert (itg * lengths).sum() / lengths.sum() == pytest.approx(
        float(metrics["itg_accuracy"]), abs=1e-3
    )
    assert found["metrics"]["r1_text"]["chance"]["value"] == pytest.approx(1 / count, abs=1e-5)
    assert found["metrics"]["itm"]["chance"]["value"] == pytest.approx(2 / 3, abs=1e-5)
