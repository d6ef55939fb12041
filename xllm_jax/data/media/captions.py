"""Captions of what answers stand for, as media of the feature cache: a caption is its own path.

What a frozen text encoder makes of a caption is computed once and kept (`feature_cache`), as what
an encoder makes of a picture. An item is the caption's ids.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from xllm_jax.core.media_names import captions_of
from xllm_jax.core.stage import Data
from xllm_jax.data.example import Example
from xllm_jax.data.media.modality import Modality
from xllm_jax.data.text.clip_tokenizer import ClipTokenizer

TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")


def media_of(example: Example) -> tuple[tuple[str, str], ...]:
    """(modality, path) of all that a cache may hold of an example: its media and its captions."""
    said = ((captions_of(modality), caption) for modality, caption in example.outputs)
    return (*example.media, *said)


def ids(tokenizer: ClipTokenizer, caption: str, data: Data) -> np.ndarray:
    """Ids of a caption as an item of media, `[1, C]` float32, which holds every id exactly."""
    return tokenizer.encode([caption], data.caption_length).astype(np.float32)


def _load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    return ids(ClipTokenizer(data.caption_tokenizer), path, data)


def _shape(data: Data) -> tuple[int, ...]:
    return (data.caption_length,)


def _settings(data: Data) -> dict[str, str]:
    """The tokenizer by what its files hold, wherever they lie."""
    from xllm_jax.core import checksum  # brings JAX, which readers of data do without

    held = {
        name: checksum.of_json((Path(data.caption_tokenizer) / name).read_text("utf-8"))
        for name in TOKENIZER
        if (Path(data.caption_tokenizer) / name).is_file()
    }
    return {"data.caption_tokenizer": checksum.of_json(held)}


def find(name: str, data: Data) -> Modality | None:
    """The record of a modality's captions by their name, None for any other name."""
    if name not in map(captions_of, data.signals):
        return None
    return Modality(
        load=_load,
        read=functools.partial(str),
        shape=_shape,
        fields=("caption_length",),
        settings=_settings,
        libraries=("tokenizers",),
    )
