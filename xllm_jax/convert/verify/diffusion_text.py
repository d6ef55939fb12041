"""Recorded text encoders of diffusion models: ids of captions, every layer, masks."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import import_tree, sizes
from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.sources import clip_text as table
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core.types import Params
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer
from xllm_jax.models.clip_text import ClipText

VARIANT = "variants/text_encoder_transformers5"  # of the text encoder that draws clips


@functools.cache
def encoder(folder: Path) -> tuple[ClipText, Params]:
    """A recorded text encoder as ours, and its parameters."""
    opened = open_checkpoint(folder)
    net = ClipText(**table.fields(opened))
    rows = table.rows(net.depth, net.heads, source=table.prefix(opened))
    return net, import_tree(rows, opened, sizes.shapes_of(net), drop=table.DROP)[0]


def images(replay: Replay, *_: object) -> None:
    """That of Stable Diffusion 1.x, which was recorded beside `sd/`."""
    _values(replay, replay.folder / "sd", replay.folder / "sd/text_encoder")


def clips(replay: Replay, *_: object) -> None:
    """That of Zeroscope, from the published names and from those of transformers 5."""
    home = replay.folder / "zeroscope"
    _values(replay, home, home / "text_encoder")
    if (replay.folder / VARIANT).is_dir():
        _values(replay, home, replay.folder / VARIANT)


def _values(replay: Replay, home: Path, weights: Path) -> None:
    replay.attempt(_ids, home)
    net, params = encoder(weights)
    apply = functools.partial(net.apply, {"params": params})

    def states(ids: np.ndarray, mask: np.ndarray | None = None) -> jax.Array:
        return apply(jnp.asarray(ids), mask, method="states")

    ids = replay.input("input_ids")
    whole = dict(capture_intermediates=True, mutable=["intermediates"], method="states")
    last, seen = apply(jnp.asarray(ids), **whole)
    seen = seen["intermediates"]
    replay.compare("embeddings", seen["embeddings"]["__call__"][0])
    for number in range(net.depth):
        replay.compare(f"encoder.layers.{number}", seen["layers"]["__call__"][0][0][number])
    replay.compare("last_hidden_state", last)
    replay.compare("pooler_output", apply(jnp.asarray(ids)))
    for case in ("short", "random"):
        replay.compare(f"{case}.last_hidden_state", states(replay.input(f"{case}.input_ids")))
    mask = replay.input("tokenizer_attention_mask").astype(bool)
    replay.compare("masked.last_hidden_state", states(ids, mask))


def _ids(replay: Replay, home: Path) -> None:
    """Ids of the captions, padded; of `short`, as many as it has."""
    ids, about = replay.recorded("input_ids"), replay.about()
    tokenizer = ClipTokenizer(home / "tokenizer")
    made = tokenizer.encode(about["captions"], ids.shape[1])
    replay.compare("input_ids", made)
    # The end of a text is its first token of that id; what stands behind it is padding.
    length = np.argmax(made == tokenizer.end, axis=1)[:, None] + 1
    replay.compare("tokenizer_attention_mask", (np.arange(ids.shape[1]) < length).astype(ids.dtype))
    short = replay.recorded("short.input_ids")
    alone = tokenizer.encode(about["captions"][:1], short.shape[1])
    replay.compare("short.input_ids", alone)
