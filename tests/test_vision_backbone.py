"""The shipped mini vision encoder: written as it was trained, good at what no training shows."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from xllm_jax.convert import export_tree, files, import_tree, sizes
from xllm_jax.convert.sources import eva_vit, world
from xllm_jax.models import vit

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import vision_probe


@pytest.fixture(scope="module")
def model():
    return vit.VisionTransformer(**vit.SIZES["tiny"])


@pytest.fixture(scope="module")
def params(model):
    """Random values that float16 holds."""
    rng = np.random.default_rng(0)
    shapes = sizes.shapes_of(model)
    return jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(np.float16).astype(np.float32), shapes
    )


def test_what_is_exported_comes_back_bit_by_bit(model, params, tmp_path):
    """Also the queries, keys and values, three pieces of one tensor."""
    world.export_vision(model, params, tmp_path)
    rows = eva_vit.rows(model.depth, model.heads)
    back, _ = import_tree(rows, files.open_checkpoint(tmp_path), sizes.shapes_of(model))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_tensors_are_in_the_order_that_writers_take(model, params):
    tensors = export_tree(eva_vit.rows(model.depth, model.heads), params)
    assert "blocks.0.attn.qkv.weight" in tensors
    assert all(tensor.flags.c_contiguous for tensor in tensors.values())


def test_the_shipped_one_tells_held_out_pairs_apart():
    """A linear classifier on its patches, fitted to other pairs, names shape, color and size."""
    found = vision_probe.probe(learn=400, ask=100)
    assert min(found["known"].values()) > 0.98
    assert min(found["held-out"].values()) > 0.8
