"""Requests to draw scenes of the embedded world, made when they are read: no files.

    Source("world_requests", options={"count": 20_000})

An example's key names its request (`synthetic_world/requests.py`), of which a judge can tell
whether a picture fulfils it. The training split knows the pairs of shape and color that the world's
captions hold, in their wordings; validation and test also have the held-out ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from xllm_jax.core.errors import UserError
from xllm_jax.data.example import Example
from xllm_jax.data.rows.lazy import Lazy
from xllm_jax.data.synthetic_world import requests
from xllm_jax.data.synthetic_world.requests import Request, sample_request
from xllm_jax.data.synthetic_world.scene import generator
from xllm_jax.data.text import instructions_to_draw

SPLITS = {"train": 1, "val": 2, "test": 3}
UNSEEN = 0.5  # share of held-out requests that ask for pairs that no training request names


def examples(
    path: str = "",
    split: str = "train",
    count: int = 100_000,
    seed: int = 2000,
    wording: str = "zh",
    echo: bool = False,
    reply: bool = False,
) -> Sequence[Example]:
    """The stream of a split.

    Args:
      path: is not read.
      split: train, val or test; each has a stream of its own.
      count: of requests.
      seed: of the streams.
      wording, echo, reply: as of `sources/requests.py`.

    Raises:
      UserError: an unknown split or wording.
    """
    if split not in SPLITS:
        hint = f"Choices: {', '.join(SPLITS)}"
        raise UserError(f"unknown split {split!r}", field="split", hint=hint)
    words = instructions_to_draw.find(wording, "options.wording")

    def example(index: int) -> Example:
        key = f"{split}-{seed}-{index}"
        asked = asked_for(key)
        caption = requests.caption(asked)
        return instructions_to_draw.request(key, caption, "image", words, echo, reply, asked.said)

    return Lazy(count, example)


def asked_for(key: str) -> Request:
    """The request of an example's key."""
    split, seed, index = key.split("-")
    rng = generator(SPLITS[split] + 10 * int(seed), "world_requests", int(index))
    if split == "train":
        return sample_request(rng, "seen")
    unseen = bool(rng.random() < UNSEEN)
    return sample_request(rng, "unseen" if unseen else "seen", unseen_wording=True)
