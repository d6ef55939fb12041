"""What stage 1 of the Q-Former knows of held-out pictures and captions: part of `xllm evaluate`."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.core.batch import ImageTextPairs
from xllm_jax.core.stage import Source, Validation
from xllm_jax.core.types import Params
from xllm_jax.data.pipeline import Pipeline
from xllm_jax.evaluation import measure, scorers
from xllm_jax.inference.load_run import Restored
from xllm_jax.models.blip2_pretraining import ContrastModel
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import blip2_pretraining as blip2

MODALITY = "image"
CONSTANT = 2 / 3  # of ITM's rows do not match


def evaluate(restored: Restored, root: str, source: Source, most: int) -> dict[str, Any]:
    """Measures ITC, ITM and ITG of a finished run on pairs that it was not trained on.

    Args:
      restored: a run of stage 1, image.
      root: folder of the data.
      source: of the pairs, one caption of each picture.
      most: how many pairs at most.

    Returns:
      JSON as of `measure.measure`: 'r1_text' and 'r1_image', how often the caption of a picture is
      the nearest of all captions, and the picture of a caption the nearest of all pictures; 'itm',
      how many of pairs, and of as many hard negatives of either side from its batch, are told
      rightly; 'itg', how many pieces of a caption follow from the picture and the pieces before.
    """
    began = time.monotonic()
    found = [_batch(restored, batch) for batch in batches(restored, root, source, most)]
    images, texts = (np.concatenate([one[name] for one in found]) for name in ("image", "text"))
    to_text, to_image = blip2.similarities(images, texts, jnp.ones(()))
    own = np.arange(len(texts))
    hits = {
        "r1_text": np.asarray(to_text.argmax(-1)) == own,
        "r1_image": np.asarray(to_image.argmax(-1)) == own,
        **{name: np.concatenate([one[name] for one in found]) for name in ("itm", "itg")},
    }
    chance = {"r1_text": 1 / len(own), "r1_image": 1 / len(own), "itm": CONSTANT}
    return {
        "title": "Pictures and captions after stage 1",
        "samples": len(own),
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {name: _metric(values, chance.get(name)) for name, values in hits.items()},
        "shown": [],
        "keys": [str(number) for number in own],
    }


def _metric(values: np.ndarray, chance: float | None) -> dict[str, Any]:
    score = scorers.average(values)
    asides = {} if chance is None else {"chance": scorers.average(np.full(len(values), chance))}
    return measure.metric(score, asides, ())


def batches(restored: Restored, root: str, source: Source, most: int) -> Iterator[ImageTextPairs]:
    """One pass over the pairs, in batches as the run had them."""
    held = Validation({"pairs": source}, {"pairs": 1.0}, most)
    data = dataclasses.replace(
        restored.stage.data, root=root, sources=held.sources, mix=held.mix, cache=""
    )
    pipeline = Pipeline(data, 0, train=False, sample=most)
    return (cast(ImageTextPairs, batch) for batch, _ in pipeline.iterate())


def _batch(restored: Restored, batch: ImageTextPairs) -> dict[str, np.ndarray]:
    """{name: of each pair of a batch}, see `evaluate`; embeddings of 'image' and 'text'."""
    part = restored.model.parts(MODALITY)[1]
    network = cast(ContrastModel, restored.model.networks[part])
    made = jax.device_get(_measured(restored.model, network, part)(restored.params, batch))
    real = np.asarray(batch.weights) > 0
    found = {name: x[real] for name, x in made.items() if name != "itm"}
    rows = made["itm"].reshape(3, -1)[:, real].T  # pair, other picture, other caption
    return found | {"itm": rows.mean(-1)}


@functools.cache
def _measured(
    model: XLLM, network: ContrastModel, part: str
) -> Callable[[Params, ImageTextPairs], dict[str, jax.Array]]:
    """The compiled pass over one batch."""

    def run(params: Params, batch: ImageTextPairs) -> dict[str, jax.Array]:
        encoder, _ = model.parts(MODALITY)
        features, _ = model.apply(params, encoder, batch.images, None)

        def apply(method: str, *inputs: Any) -> Any:
            return network.apply({"params": params[part]}, *inputs, method=method)

        ids, mask = jnp.asarray(batch.ids), jnp.asarray(batch.mask)
        image = apply("normalize", features)
        _, units, cache = apply("image", image)
        texts = apply("text", ids, mask)[1][:, 0]
        similar = blip2.similarities(units, texts, params[part]["temperature"])
        weights = jnp.asarray(batch.weights)
        drawn = blip2.sample_negatives(jax.random.key(0), *similar, "xllm", weights)
        rows = blip2.matching_rows(image, ids, mask, *drawn)
        told = apply("match", *rows)[1].mean(1).argmax(-1)
        truth = (jnp.arange(told.shape[0]) < told.shape[0] // 3).astype(told.dtype)
        logits = apply("caption", ids.at[:, 0].set(network.vocabulary - 1), mask, cache)[1]
        wanted = mask[:, 1:]
        right = (logits[:, :-1].argmax(-1) == ids[:, 1:]) & wanted
        itg = right.sum(1) / jnp.maximum(wanted.sum(1), 1)
        return {"image": units, "text": texts, "itm": told == truth, "itg": itg}

    return jax.jit(run)
