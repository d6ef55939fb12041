"""The recorded LLM in our form, and one forward pass through it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import run_import
from xllm_jax.convert.sources import chatglm
from xllm_jax.core.errors import UserError
from xllm_jax.core.types import Params
from xllm_jax.data.text import glm_layout
from xllm_jax.data.text.chatglm_tokenizer import ChatGLMTokenizer
from xllm_jax.data.text.glm_layout import Specials
from xllm_jax.models.glm import ChatGLM
from xllm_jax.models.xllm import XLLM


class Reference:
    """Weights, special ids and tokenizer of a recording's folder, each read when it is needed."""

    def __init__(self, folder: Path):
        self.folder = folder

    @functools.cached_property
    def loaded(self) -> tuple[ChatGLM, Params]:
        """(float32 model, parameters)."""
        model, params = read_llm(self.folder / "weights")
        return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)

    @functools.cached_property
    def specials(self) -> Specials:
        """Special ids by the checkpoint's word."""
        path = self.folder / "weights"
        config = chatglm.read_config(path)
        names = {"mask": "mask", "gmask": "gmask", "sop": "bos", "eop": "eos", "pad": "pad"}
        missing = [
            f"{name}_token_id" for name in names.values() if f"{name}_token_id" not in config
        ]
        if missing:
            raise UserError(f"no {missing[0]!r} in it", field=str(path / "config.json"))
        return Specials(**{ours: config[f"{theirs}_token_id"] for ours, theirs in names.items()})

    @functools.cached_property
    def tokenizer(self) -> ChatGLMTokenizer:
        """The recording's tokenizer."""
        return ChatGLMTokenizer(self.folder / "tokenizer")

    @functools.cached_property
    def composed(self) -> tuple[XLLM, Params]:
        """(X-LLM of the LLM alone, parameters)."""
        model, params = self.loaded
        return XLLM({"llm": model}), {"llm": params}


def read_llm(folder: Path) -> tuple[ChatGLM, Params]:
    """(float32 model, parameters in the file's dtype) of a checkpoint's folder."""
    found = run_import.examine("chatglm", folder)
    return chatglm.network(found.options), found.tree()["llm"]


def layout_of(ids: np.ndarray, specials: Specials) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segments, context and positions of sequences `[B, T]` as the reference lays them out."""
    rows = [glm_layout.sequence(one, specials, padding_visible=True) for one in ids]
    return tuple(
        np.stack([getattr(row, name) for row in rows])
        for name in ("segments", "context", "positions")
    )


def forward(
    model: ChatGLM, params: Params, ids: np.ndarray, layout: tuple, capture: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array, dict[str, Any]]:
    """(embeddings, final states, logits, intermediates when asked for)."""
    variables = {"params": params}

    @jax.jit
    def run(variables: Params, ids: jax.Array, layout: tuple):
        x = model.apply(variables, ids, method="embed")
        extra = dict(capture_intermediates=True, mutable=["intermediates"]) if capture else {}
        out = model.apply(variables, x, *layout, **extra)
        (states, _), seen = out if capture else (out, {"intermediates": {}})
        return x, states, model.apply(variables, states, method="logits"), seen["intermediates"]

    return run(variables, ids, layout)
