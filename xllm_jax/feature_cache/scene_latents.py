"""Latents of the world's drawn requests, computed once by a trained autoencoder.

The UNet of the miniature is so small that encoding its pictures would take most of its training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.core import atomic
from xllm_jax.core.errors import UserError
from xllm_jax.core.new_folder import new_folder
from xllm_jax.core.progress import Bar
from xllm_jax.core.types import Params
from xllm_jax.data.batching import scene_latents, scene_pictures, scene_rows
from xllm_jax.models.outputs.autoencoder import Autoencoder, deviation

BATCH = 64  # pictures at a time
MEASURED = 1024  # pictures whose latents tell the scaling

Picture = Callable[[str], np.ndarray]
"""Key of a request -> `[side, side, 3]` float32."""


def write(
    network: Autoencoder, params: Params, seed: int, count: int, side: int, folder: Path
) -> float:
    """Writes the folder that `data/batching/scene_latents.py` reads.

    Args:
      network, params: the autoencoder.
      seed, count: of the stream of requests, see `sources/world_scenes.py`.
      side: of the pictures, in pixels.
      folder: is replaced.

    Returns:
      The scaling: 1 / the deviation of the latents, by which those in the folder are multiplied.

    Raises:
      UserError: no pictures, or latents that do not vary.
    """
    if count < 1:
        raise UserError(f"{count} pictures", field="count", hint="At least 1")
    run = jax.jit(functools.partial(network.apply, method="encode"))

    def latents(start: int) -> tuple[np.ndarray, np.ndarray]:
        keys = [f"{seed}-{min(i, count - 1)}" for i in range(start, start + BATCH)]
        asked = [scene_rows.asked_for(key)[0] for key in keys]
        images = np.stack([scene_pictures.picture(request, side) for request in asked])
        mean, logvar = run({"params": params}, images)
        return np.asarray(mean), np.asarray(deviation(jnp.asarray(logvar)))

    first = np.concatenate([latents(start)[0] for start in range(0, min(count, MEASURED), BATCH)])
    spread = float(first[:count].std())
    if not spread > 0:
        raise UserError("gives latents that do not vary", field="vae", hint="Train it first")
    with new_folder(folder) as partial:
        partial.mkdir(parents=True)
        shape = (count, *first.shape[1:])
        held = [
            np.lib.format.open_memmap(partial / name, "w+", np.float16, shape)
            for name in (scene_latents.MEANS, scene_latents.DEVIATIONS)
        ]
        for start in Bar(range(0, count, BATCH), "latents", unit="batches"):
            for array, made in zip(held, latents(start)):
                array[start : start + BATCH] = made[: count - start] / spread
        for array in held:
            array.flush()
        about = {"seed": seed, "count": count, "scaling": 1 / spread, "side": shape[1]}
        atomic.write_json(partial / scene_latents.ABOUT, about)
    return 1 / spread
