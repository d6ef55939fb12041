"""The recorded vision models, built and loaded from the files of a recording."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import Report, import_tree
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import blip2, eva_vit
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.convert.verify.tolerances import Tolerances
from xllm_jax.convert.verify.tolerances import read as read_tolerances
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.vit import VisionTransformer

CONFIG, INFO, BERT = "config.json", "cases_info.json", "cases_bert_init.json"
VIT, STAGE1 = "eva_vit_g.pth", "blip2_pretrained.pth"


class Reference:
    """Sizes, weights and notes of a recording's folder, each read when it is needed."""

    def __init__(self, folder: Path):
        self.folder, self.weights = folder, folder / "weights"

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Sizes of the recorded models."""
        return read_json(self.folder / CONFIG)

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """Captions, parameter orders and notes."""
        return read_json(self.folder / INFO)

    @functools.cached_property
    def start(self) -> int:
        """Id that begins a caption."""
        return int(read_json(self.folder / BERT)["bos_token_id"])

    @functools.cached_property
    def limits(self) -> Tolerances:
        """Tolerances of the whole folder."""
        return read_tolerances(self.folder)

    @functools.cached_property
    def vision(self) -> tuple[VisionTransformer, dict[str, Any]]:
        """The vision encoder and its float32 parameters."""
        model = vision_transformer(self.config)
        source = open_checkpoint(self.weights / VIT)
        eva_vit.check_depth(source, model.depth)
        table = eva_vit.rows(model.depth, model.heads)
        shapes = vision_shapes(model)
        tree, _ = import_tree(table, source, shapes, drop=eva_vit.drop(model.depth))
        return model, float32(tree)

    @functools.cached_property
    def encode(self):
        """The compiled vision encoder: recorded pixels to (features, lengths)."""
        model, params = self.vision
        return jax.jit(lambda pixels: model.apply({"params": params}, images(pixels)))

    @functools.cached_property
    def contrast(self) -> tuple[ContrastModel, dict[str, Any]]:
        """The stage-1 model and its float32 parameters."""
        source = open_checkpoint(self.weights / STAGE1)
        model = contrast_model(self.config, source[blip2.WORDS].shape[0])
        tree, _ = blip2.contrast(source, model, shapes_of(model))
        return model, float32(tree)

    def interface(self, file: str, **options: Any) -> tuple[QFormerInterface, dict, Report]:
        """An interface, its float32 parameters and the import's report."""
        source = open_checkpoint(self.weights / file)
        model = interface_model(self.config)
        tree, report = blip2.interface(source, model, shapes_of(model), **options)
        return model, float32(tree), report

    def other(self, file: str) -> Replay:
        """Another file of the recording, to read inputs from."""
        return Replay(self.folder / file, self.limits)


def images(pixels: np.ndarray) -> np.ndarray:
    """Recorded channels-first pixels to ours."""
    return jnp.moveaxis(pixels, -3, -1)


def float32(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of any file's dtype as float32."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def vision_transformer(config: Mapping[str, Any]) -> VisionTransformer:
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
    )


def vision_shapes(model: VisionTransformer) -> dict[str, Any]:
    """Shapes of its parameters."""
    example = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.eval_shape(model.init, jax.random.key(0), example)["params"]


def _qformer_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
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
        norm_epsilon=config["ln_vision_eps"],
    )


def contrast_model(config: Mapping[str, Any], vocabulary: int, **fields: Any) -> ContrastModel:
    """The stage-1 model of a recording."""
    return ContrastModel(
        **_qformer_sizes(config) | fields,
        vocabulary=vocabulary,
        positions=config["qformer"]["max_position_embeddings"],
        embed=config["itc_embed_dim"],
    )


def interface_model(config: Mapping[str, Any], **fields: Any) -> QFormerInterface:
    """The image or video interface of a recording."""
    return QFormerInterface(**_qformer_sizes(config) | fields, llm_width=config["lm_hidden"])


def shapes_of(model: Any) -> dict[str, Any]:
    """Shapes of the parameters of a model with an example."""
    return jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]


def contrast_table(model: ContrastModel) -> tuple:
    """Rows of the published stage-1 file, which also name gradients."""
    sizes = (model.depth, model.heads, model.cross_attention_frequency)
    return (*blip2.rows(*sizes, "lavis", text=True), *blip2.head_rows("lavis"))


def interface_table(model: QFormerInterface) -> tuple:
    """Rows of the published stage-2 file, which also name gradients."""
    sizes = (model.depth, model.heads, model.cross_attention_frequency)
    return (*blip2.rows(*sizes, "lavis", text=False), *blip2.linear("opt_proj", "adapter"))


def norms(tensors: Mapping[str, np.ndarray], order: list[str]) -> np.ndarray:
    """L2 norm of every tensor, float64 of the order's length."""
    return np.array([np.linalg.norm(tensors[name].astype(np.float64)) for name in order])
