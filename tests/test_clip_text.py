"""Text encoders of Stable Diffusion: their sizes."""

from __future__ import annotations

import jax
import pytest

from xllm_jax.convert.sources import clip_text as table
from xllm_jax.core import rules
from xllm_jax.models import clip_text


@pytest.mark.parametrize(
    "size, count", [("clip_vit_l_14", 123_060_480), ("open_clip_vit_h_14", 340_387_840)]
)
def test_published_sizes(size, count):
    model = clip_text.ClipText(**clip_text.SIZES[size])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    rules.assign(clip_text.SHARDING, shapes, what="clip_text.SHARDING", total=False)
    filled = {row.target for row in table.rows(model.depth, model.heads)}
    assert filled == set(rules.flatten(shapes))
