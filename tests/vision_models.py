"""The recorded vision models, built and loaded from the files of a recording."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from xllm_jax.convert import import_tree
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import blip2, eva_vit
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.vit import VisionTransformer


def config_of(golden: Path) -> dict:
    """Sizes of the recording."""
    return json.loads((golden / "vision/config.json").read_text())


def to_torch(array: np.ndarray):
    """A torch tensor of the same bits, bfloat16 too."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def images(pixels: np.ndarray) -> np.ndarray:
    """Recorded channels-first pixels to ours."""
    return np.moveaxis(pixels, -3, -1)


def float32(tree: dict) -> dict:
    """Arrays of any file's dtype as float32."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def vision_transformer(config: dict, **fields) -> VisionTransformer:
    """The vision encoder of a recording."""
    sizes = config["vit"]
    return VisionTransformer(
        image_size=sizes["img_size"],
        patch=sizes["patch_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        hidden=sizes["mlp_hidden"],
        epsilon=sizes["norm_eps"],
        **fields,
    )


def vision_shapes(model: VisionTransformer) -> dict:
    """Shapes of its parameters."""
    example = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), example)["params"]


def load_vision(golden: Path) -> tuple[VisionTransformer, dict]:
    """The vision encoder and its float32 parameters."""
    model = vision_transformer(config_of(golden))
    source = open_checkpoint(golden / "vision/weights/eva_vit_g.pth")
    table = eva_vit.rows(model.depth, model.heads)
    tree, _ = import_tree(table, source, vision_shapes(model), drop=eva_vit.drop(model.depth))
    return model, float32(tree)


def _qformer_sizes(config: dict) -> dict:
    sizes = config["qformer"]
    return dict(
        queries=sizes["num_query_token"],
        width=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        hidden=sizes["intermediate_size"],
        cross_attention_frequency=sizes["cross_attention_freq"],
        encoder_width=sizes["encoder_width"],
        epsilon=sizes["layer_norm_eps"],
        dropout=sizes["hidden_dropout_prob"],
    )


def contrast_model(config: dict, vocabulary: int, **fields) -> ContrastModel:
    """The stage-1 model of a recording."""
    base = _qformer_sizes(config) | {"norm_epsilon": config["ln_vision_eps"]}
    return ContrastModel(
        **base | fields,
        vocabulary=vocabulary,
        positions=config["qformer"]["max_position_embeddings"],
        embed=config["itc_embed_dim"],
    )


def interface_model(config: dict, **fields) -> QFormerInterface:
    """The image or video interface of a recording."""
    base = _qformer_sizes(config) | {"norm_epsilon": config["ln_vision_eps"]}
    return QFormerInterface(**base | fields, llm_width=config["lm_hidden"])


def shapes_of(model) -> dict:
    """Shapes of the parameters of a model with an example."""
    return jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]


def load_contrast(golden: Path, file: str = "blip2_pretrained.pth"):
    """The stage-1 model, its float32 parameters and the opened file."""
    source = open_checkpoint(golden / "vision/weights" / file)
    model = contrast_model(config_of(golden), source[blip2.WORDS].shape[0])
    tree, _ = blip2.contrast(source, model, shapes_of(model))
    return model, float32(tree), source


def load_interface(golden: Path, file: str, **options):
    """An interface, its float32 parameters and the import's report."""
    source = open_checkpoint(golden / "vision/weights" / file)
    model = interface_model(config_of(golden))
    tree, report = blip2.interface(source, model, shapes_of(model), **options)
    return model, float32(tree), report


def info_of(golden: Path) -> dict:
    """Captions, parameter orders and notes of the recording."""
    return json.loads((golden / "vision/cases_info.json").read_text())


def contrast_table(model: ContrastModel) -> tuple:
    """Rows of the LAVIS stage-1 file, also used to name gradients and updates."""
    sizes = (model.depth, model.heads, model.cross_attention_frequency)
    return (*blip2.rows(*sizes, "lavis", text=True), *blip2.head_rows("lavis"))


def interface_table(model: QFormerInterface) -> tuple:
    """Rows of the LAVIS stage-2 file."""
    sizes = (model.depth, model.heads, model.cross_attention_frequency)
    return (*blip2.rows(*sizes, "lavis", text=False), *blip2.linear("opt_proj", "adapter"))
