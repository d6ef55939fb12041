"""What a linear classifier reads from the shipped mini vision encoder, patch by patch.

    PYTHONPATH=. python benchmarks/vision_probe.py

Logistic regression on the features of drawn scenes without held-out pairs of shape and color. Asked
are other scenes, of each object the patches that show it. An interface sees no more pairs than this
classifier: where an encoder's features mean a shape only together with the colors that it was
trained on, held-out pairs are told wrongly here, and hardly better above an interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import xllm_jax
from xllm_jax.convert import files, import_tree, sizes
from xllm_jax.convert.sources import eva_vit
from xllm_jax.data.batching import scene_attributes
from xllm_jax.data.media import image
from xllm_jax.data.synthetic_world.render import render_scene, sprites
from xllm_jax.data.synthetic_world.scene import HELD_OUT, Scene, generator, sample_scene
from xllm_jax.models import vit

softmax_loss = optax.softmax_cross_entropy_with_integer_labels
SHIPPED = Path(xllm_jax.__file__).parent / "data/synthetic_world/backbones/vision_encoder"
ATTRIBUTES = ("shape", "color", "size", "place")
CLASSES = (5, 6, 2, 9)
SIDE, GRID = 96, 6


def probe(learn: int = 800, ask: int = 300) -> dict[str, dict[str, float]]:
    """{'known' or 'held-out' pair: {attribute: share of patches right}}.

    Args:
      learn: scenes that the classifier is fitted to.
      ask: scenes with a held-out pair that it is asked about.
    """
    values, labels = features(scenes("seen", learn))
    there = labels[..., 0] > 0
    read = fitted(values[there], labels[there] - 1)
    asked = scenes("unseen", ask)
    values, labels = features(asked)
    told = read(values) + 1
    found: dict[str, dict[str, float]] = {}
    for name, held_out in (("known", False), ("held-out", True)):
        where = np.stack([shown(scene, held_out) for scene in asked])
        right = (told == labels)[where]
        found[name] = dict(zip(ATTRIBUTES, right.mean(0).tolist()))
    return found


def scenes(pairs: str, count: int) -> list[Scene]:
    """Scenes of seeds that no training draws."""
    return [sample_scene(generator(7, "probe", pairs, i), pairs) for i in range(count)]


def fitted(values: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Multinomial logistic regression of every attribute by L-BFGS.

    Args:
      values: `[patches, width]` float32.
      labels: `[patches, 4]` int32.

    Returns:
      function of `[..., width]` to `[..., 4]` classes.
    """
    starts = np.cumsum(CLASSES)[:-1].tolist()
    middle, spread = values.mean(0), values.std(0)

    def scores(weights: jax.Array, given: jax.Array | np.ndarray) -> list[jax.Array]:
        scaled = (given - middle) / spread
        return jnp.split(scaled @ weights[:-1] + weights[-1], starts, axis=-1)

    def loss(weights: jax.Array) -> jax.Array:
        parts = enumerate(scores(weights, values))
        losses = [softmax_loss(part, labels[:, i]).mean() for i, part in parts]
        return jnp.stack(losses).sum() + 1e-4 * (weights**2).sum()

    solver = optax.lbfgs()
    start = jnp.zeros((values.shape[-1] + 1, sum(CLASSES)))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        weights, state = carry
        value, gradient = optax.value_and_grad_from_state(loss)(weights, state=state)
        updates, state = solver.update(
            gradient, state, weights, value=value, grad=gradient, value_fn=loss
        )
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (start, solver.init(start)), length=100)
    return lambda given: np.stack([part.argmax(-1) for part in scores(weights, given)], -1)


def features(drawn: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """(the encoder's patches `[scenes, patches, width]`, `[scenes, patches, 4]` labels)."""
    model = vit.VisionTransformer(**vit.SIZES["tiny"])
    rows = eva_vit.rows(model.depth, model.heads)
    params, _ = import_tree(rows, files.open_checkpoint(SHIPPED), sizes.shapes_of(model))
    encode = jax.jit(lambda pixels: model.apply({"params": params}, pixels)[0][:, 1:])
    labels = np.stack([scene_attributes.patch_labels(scene, GRID) for scene in drawn])
    return np.concatenate([np.asarray(encode(one)) for one in pictures(drawn)]), labels


def pictures(drawn: list[Scene], count: int = 100) -> Iterator[jax.Array]:
    """`[count, 96, 96, 3]` pixels as the encoder reads them."""
    for start in range(0, len(drawn), count):
        pixels = [image.resize(render_scene(s), SIDE) for s in drawn[start : start + count]]
        yield jnp.stack([image.normalize(one, "clip") for one in pixels])


def shown(scene: Scene, held_out: bool) -> np.ndarray:
    """`[patches]` bool: where an object stands whose pair is held out, or is not."""
    numbers = [n for n, x in enumerate(scene.objects, 1) if (x.pair in HELD_OUT) == held_out]
    return np.isin(scene_attributes.owners(sprites(scene), GRID), numbers)


if __name__ == "__main__":
    print(f"| pairs of shape and color | {' | '.join(ATTRIBUTES)} |\n{'| --- ' * 5}|")
    for pair, row in probe().items():
        print(f"| {pair} | {' | '.join(f'{100 * row[name]:.1f}' for name in ATTRIBUTES)} |")
