"""The recorded pipeline of diffusers, read by our own tables, and the names of its modules."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from xllm_jax.assembly.submodules import submodules
from xllm_jax.convert import run_import
from xllm_jax.convert.sources import stable_diffusion
from xllm_jax.core.errors import UserError

MODULES = (
    (r"down_blocks\.(\d+)", r"down_\1"),
    (r"up_blocks\.(\d+)", r"up_\1"),
    (r"mid_block", "middle"),
    (r"resnets\.(\d+)", r"resnet_\1"),
    (r"attentions\.(\d+)", r"transformer_\1"),
    (r"transformer_blocks\.0", "block"),
    (r"downsamplers\.0", "downsample"),
    (r"upsamplers\.0", "upsample"),
    (r"norm([12])$", r"norm_\1"),
    (r"conv_norm_out", "norm_out"),
    (r"time_embedding", "time"),
    (r"proj_in", "project_in"),
    (r"attn1", "attention"),
    (r"attn2", "cross_attention"),
    (r"ff(?=\.|$)", "feed_forward"),
    (r"group_norm", "norm"),
    (r"post_quant_conv", "latents"),
    (r"quant_conv", "moments"),
)
"""Modules of diffusers by ours, between dots; norms of a transformer's block are in BLOCK_NORMS."""
BLOCK_NORMS = {"norm1": "attention_norm", "norm2": "cross_norm", "norm3": "feed_forward_norm"}


class Pipeline:
    """The networks of a recorded folder with their parameters in float32, read when asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._modules: dict[str, Mapping[str, Any]] = {}

    @functools.cached_property
    def _read(self) -> tuple[dict[str, stable_diffusion.Network], dict[str, Any]]:
        found = run_import.examine("stable_diffusion", self.folder)
        tree = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), found.tree())
        return stable_diffusion.networks(found.options), tree

    def network(self, part: str) -> Any:
        """One of the networks: 'unet', 'vae' or 'text_encoder'.

        Raises:
          UserError: the folder lacks it or cannot be read.
        """
        networks, _ = self._read
        if part not in networks:
            raise UserError("has no such part", field=f"{self.folder}: {part}")
        return networks[part]

    def params(self, part: str) -> dict[str, Any]:
        """Parameters of a network."""
        return self._read[1][part]

    def modules(self, part: str) -> Mapping[str, Any]:
        """{path: module} of all that a network calls, which is traced once."""
        if part not in self._modules:
            self._modules[part] = submodules(self.network(part))
        return self._modules[part]


def ours(module: str, part: str = "unet") -> list[str]:
    """The path of a module of diffusers in our networks.

    Args:
      module: such as 'down_blocks.0.resnets.1.norm1'.
      part: that it belongs to; the autoencoder's attention is no transformer.
    """
    start, _, last = module.rpartition(".")
    if start.endswith("transformer_blocks.0") and last in BLOCK_NORMS:
        return [*ours(start), BLOCK_NORMS[last]]
    for pattern, name in MODULES:
        module = re.sub(rf"(?:(?<=\.)|(?<=^)){pattern}", name, module)
    path = module.split(".")
    return ["attention" if part == "vae" and n == "transformer_0" else n for n in path]


def inside(tree: Mapping[str, Any], path: list[str]) -> Any:
    """What lies at a path of nested mappings.

    Raises:
      KeyError: nothing.
    """
    for name in path:
        tree = tree[name]
    return tree


def last_channels(recorded: np.ndarray) -> jax.Array:
    """Recorded channels-first arrays to ours."""
    return jnp.moveaxis(jnp.asarray(recorded), 1, -1)


def first_channels(x: ArrayLike) -> np.ndarray:
    """Our pictures in the recorded order; tokens and vectors stay as they are."""
    x = np.asarray(x)
    return np.moveaxis(x, -1, 1) if x.ndim == 4 else x
