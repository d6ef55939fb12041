"""Text encoders of Stable Diffusion: their sizes, and folders that are refused."""

from __future__ import annotations

import json
import shutil

import jax
import pytest
from conftest import GOLDEN

from xllm_jax.convert import import_tree
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import clip_text as table
from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.models import clip_text

RECORDED = GOLDEN / "diffusion/zeroscope/text_encoder"
CONFIG = json.loads((RECORDED / "config.json").read_text())
WIDTH = CONFIG["hidden_size"]


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


@pytest.fixture
def folder(tmp_path):
    """`(changes of config.json) -> folder` of a recorded text encoder."""

    def changed(**values):
        shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text()) | values
        (tmp_path / "config.json").write_text(json.dumps(config))
        return open_checkpoint(tmp_path)

    return changed


def test_config_tells_what_shapes_do_not(folder):
    fields = table.fields(folder())
    assert fields["activation"] == "gelu" and "end" not in fields
    assert fields["heads"] == CONFIG["num_attention_heads"]
    assert table.fields(folder(hidden_act="quick_gelu")).get("activation") is None
    assert table.fields(folder(eos_token_id=7))["end"] == 7


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_act="swish2"), "hidden_act: is 'swish2', known are gelu"),
        (
            dict(num_attention_heads=WIDTH + 1),
            f"_attention_heads: is {WIDTH + 1}, which does not divide",
        ),
        (dict(hidden_size=2 * WIDTH), f"hidden_size: is {2 * WIDTH}, and the tensors say {WIDTH}"),
        (dict(model_type="bert"), "model_type: is 'bert'"),
        (dict(eos_token_id=[1, 2]), "one token ends a text"),
    ],
)
def test_other_networks_are_refused_by_field(folder, changes, message):
    with pytest.raises(UserError, match=message):
        table.fields(folder(**changes))


def test_a_folder_without_config_or_without_text_encoder(folder, tmp_path):
    opened = folder()
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: is missing"):
        table.fields(opened)
    with pytest.raises(UserError, match="is no text encoder of CLIP"):
        table.fields(open_checkpoint(GOLDEN / "diffusion/sd/vae"))


def test_a_missing_tensor_is_named(folder):
    opened = folder()
    fields = table.fields(opened)
    model = clip_text.ClipText(**fields)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    gone = "text_model.encoder.layers.1.mlp.fc2.bias"
    held = {name: opened[name] for name in opened if name != gone}
    with pytest.raises(UserError, match=gone):
        rows = table.rows(fields["depth"], fields["heads"])
        import_tree(rows, held, shapes, drop=table.DROP)
