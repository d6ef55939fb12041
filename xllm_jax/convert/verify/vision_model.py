"""The recorded vision models, built and loaded from the files of a recording."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import run_import
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import blip2, eva_vit
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.convert.verify.tolerances import Tolerances
from xllm_jax.convert.verify.tolerances import read as read_tolerances
from xllm_jax.core.types import Params
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.interfaces import QFormerInterface
from xllm_jax.models.vit import VisionTransformer

CONFIG, INFO, BERT = "config.json", "cases_info.json", "cases_bert_init.json"
VIT, STAGE1 = "eva_vit_g.pth", "blip2_pretrained.pth"
STAGE2 = "blip2_pretrained_opt_stage2.pth"


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
    def vision(self) -> tuple[VisionTransformer, Params]:
        """The vision encoder and its float32 parameters."""
        fields = vision_fields(self.config)
        eva_vit.check_depth(open_checkpoint(self.weights / VIT), fields["depth"])
        tree = self.read("eva_vit", VIT, fields)
        return VisionTransformer(**fields), tree["vision_encoder"]

    @functools.cached_property
    def encode(self):
        """The compiled vision encoder: recorded pixels to (features, lengths)."""
        model, params = self.vision
        return jax.jit(lambda pixels: model.apply({"params": params}, images(pixels)))

    @functools.cached_property
    def contrast(self) -> tuple[ContrastModel, Params]:
        """The stage-1 model and its float32 parameters."""
        source = open_checkpoint(self.weights / STAGE1)
        fields = contrast_fields(self.config, source.header(blip2.WORDS).shape[0])
        tree = self.read("blip2", STAGE1, blip2_options(fields, text=True))
        return ContrastModel(**fields), tree["image_interface"]

    def interface(self) -> tuple[QFormerInterface, Params]:
        """The image interface and its float32 parameters."""
        fields = interface_fields(self.config)
        tree = self.read("blip2", STAGE2, blip2_options(fields))
        return QFormerInterface(**fields), tree["image_interface"]

    def read(self, source: str, file: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a published file or folder of `weights/`: {part: float32 tree}.

        Args:
          source: name of the source.
          file: name of the file or folder.
          options: of the source's plan; no published size fits a recording.

        Raises:
          UserError: it does not fit.
        """
        return float32(run_import.examine(source, self.weights / file, options=options).tree())

    def other(self, file: str) -> Replay:
        """Another file of the recording, to read inputs from."""
        return Replay(self.folder / file, self.limits)


def images(pixels: np.ndarray) -> np.ndarray:
    """Recorded channels-first pixels to ours."""
    return jnp.moveaxis(pixels, -3, -1)


def float32(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays of any file's dtype as float32."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)


def vision_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recording's vision encoder."""
    sizes = config["vit"]
    return dict(
        image_size=sizes["img_size"],
        patch=sizes["patch_size"],
        width=sizes["embed_dim"],
        depth=sizes["depth"],
        heads=sizes["num_heads"],
        hidden=sizes["mlp_hidden"],
        epsilon=sizes["norm_eps"],
    )


def interface_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recording's image or video interface."""
    return _qformer_fields(config) | {"llm_width": config["lm_hidden"]}


def contrast_fields(config: Mapping[str, Any], vocabulary: int) -> dict[str, Any]:
    """Fields of a recording's stage-1 model."""
    return _qformer_fields(config) | dict(
        vocabulary=vocabulary,
        positions=config["qformer"]["max_position_embeddings"],
        embed=config["itc_embed_dim"],
    )


def _qformer_fields(config: Mapping[str, Any]) -> dict[str, Any]:
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


def blip2_options(
    fields: Mapping[str, Any],
    kind: str = "lavis",
    text: bool = False,
    vision: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Options of BLIP-2's plan.

    Args:
      fields: of the Q-Former's network.
      kind: 'lavis' or 'hf'.
      text: the first stage, with its text branch and heads; else the second, with its adapter.
      vision: fields of the vision encoder, where it is read from the same file.
    """
    return dict(kind=kind, text=text, adapter=not text, vision=vision, interface=fields)


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
