"""The losses that pre-train the mini diffusion model, against networks that know the answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from xllm_jax.assembly.networks import shapes_of
from xllm_jax.assembly.system import System
from xllm_jax.configs import world_autoencoder, world_diffusion
from xllm_jax.core import mesh
from xllm_jax.core.batch import DescribedPictures
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching import batch_format
from xllm_jax.data.example import Example
from xllm_jax.data.record import Mode, Record
from xllm_jax.data.synthetic_world import clip_vocabulary
from xllm_jax.feature_cache import scene_latents
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import autoencoder, denoising, text_to_image
from xllm_jax.training.trainer import Trainer

SCALING = 0.5
ROWS = 8


def schedule() -> np.ndarray:
    """Stable Diffusion's shares of signal, in float64 from its definition."""
    roots = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999 for i in range(1000)]
    return np.cumprod([1 - root * root for root in roots])


class Exact(nn.Module):
    """An autoencoder whose latent is the mean of 2 x 2 pixels, without any doubt."""

    scaling: float = SCALING
    blur: float = 0.0

    def encode(self, images):
        latents = nn.avg_pool(images, (2, 2), (2, 2))
        return latents, jnp.full(latents.shape, -30.0)

    def decode(self, latents):
        return latents.repeat(2, 1).repeat(2, 2) * (1 - self.blur)


class Words(nn.Module):
    """The text is its ids."""

    def states(self, ids):
        return ids[..., None].astype(jnp.float32)


class Clairvoyant(nn.Module):
    """Knows that the latent is the words' first number, and so what of the rest is noise."""

    miss: float = 0.0

    def __call__(self, noisy, time, text):
        kept = jnp.asarray(schedule(), jnp.float32)[time][:, None, None, None]
        known = text[:, 0, 0][:, None, None, None] / 10 * SCALING
        return (noisy - jnp.sqrt(kept) * known) / jnp.sqrt(1 - kept) + self.miss


def batch() -> DescribedPictures:
    """Pictures of one gray each, and words that name it in tenths."""
    ids = np.arange(ROWS, dtype=np.int32)[:, None].repeat(4, 1)
    images = np.ones((ROWS, 8, 8, 3), np.float32) * ids[:, :1, None, None] / 10
    return DescribedPictures(ids, images)


def model(miss: float = 0.0) -> XLLM:
    """The three stand-ins."""
    parts = {"vae": Exact(), "text_encoder": Words(), "unet": Clairvoyant(miss)}
    return XLLM(networks=parts)


PARAMS = {"vae": {}, "text_encoder": {}, "unet": {}}


@pytest.mark.parametrize("key", [None, 1])
def test_who_knows_the_noise_has_no_loss(key):
    key = None if key is None else jax.random.key(key)
    value, metrics = text_to_image.loss(model(), PARAMS, batch(), key)
    # Times near 0 divide a rounding error by the small deviation of their noise.
    assert float(value) < 1e-6
    assert set(metrics) == {f"noise_error/{quarter}" for quarter in range(1, 5)}


def test_the_loss_is_the_mean_square_and_weights_follow_min_snr():
    value, metrics = text_to_image.loss(model(miss=0.3), PARAMS, batch())
    assert float(value) == pytest.approx(0.09, rel=1e-4)
    assert [float(x) for x in metrics.values()] == pytest.approx([0.09] * 4, rel=1e-4)
    gamma = 5.0
    weighted, _ = text_to_image.loss(model(miss=0.3), PARAMS, batch(), gamma=gamma)
    kept = schedule()[((np.arange(ROWS) + 0.5) * 1000 / ROWS).astype(int)]
    ratio = kept / (1 - kept)
    wanted = 0.09 * (np.minimum(ratio, gamma) / ratio).mean()
    assert float(weighted) == pytest.approx(wanted, rel=1e-4)


def test_times_cover_the_schedule_and_keys_change_them():
    seen = []

    class Watching(Clairvoyant):
        def __call__(self, noisy, time, text):
            seen.append(np.asarray(time))
            return super().__call__(noisy, time, text)

    watching = XLLM(networks={**model().networks, "unet": Watching()})
    for number in (1, 2):
        text_to_image.loss(watching, PARAMS, batch(), jax.random.key(number))
    for times in seen:
        np.testing.assert_array_equal(times * ROWS // 1000, np.arange(ROWS))
    assert (seen[0] != seen[1]).any()


def test_late_times_are_as_frequent_as_their_power_says():
    """The share of times below t is (t / T) ** late, and none lies outside of the schedule."""
    zeros = jnp.zeros((4096, 1))
    for late in (1.0, 2.0, 3.0):
        drawn = denoising.draws(text_to_image.SCHEDULE, zeros, zeros, 1.0, jax.random.key(0), late)
        times = np.asarray(drawn.times)
        assert times.min() >= 0 and times.max() == 999
        below = [(times < t).mean() for t in (250, 500, 900)]
        np.testing.assert_allclose(below, np.array([0.25, 0.5, 0.9]) ** late, atol=2e-3)


def test_times_that_are_late_below_even_are_refused():
    with pytest.raises(UserError, match=r"late=0\.5 is below 1"):
        text_to_image.loss(model(), PARAMS, batch(), late=0.5)


def test_reconstruction_counts_pixels_and_edges():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (2, 4, 4, 3)).astype(np.float32).repeat(2, 1).repeat(2, 2)
    pictures = DescribedPictures(np.zeros((2, 4), np.int32), images)
    whole = XLLM(networks={"vae": Exact()})
    assert float(autoencoder.loss(whole, PARAMS, pictures, prior=0.0)[0]) < 1e-6
    blurred = XLLM(networks={"vae": Exact(blur=0.25)})
    value, metrics = autoencoder.loss(blurred, PARAMS, pictures, edges=2.0, prior=1e-3, floor=0.5)
    wide = images.astype(np.float64)
    apart = np.abs(wide - wide.mean((1, 2), keepdims=True)).mean(-1)
    weights = 0.5 + apart / apart.mean((1, 2), keepdims=True)
    missed = 0.25 * np.abs(wide)
    pixels = (weights[..., None] * (missed + missed**2)).mean()
    edges = 0.25 * sum(np.abs(np.diff(images, axis=axis)).mean() for axis in (1, 2))
    latents = images[:, ::2, ::2].astype(np.float64)
    kl = 0.5 * (latents**2 + np.exp(-30.0) - 1 + 30).mean()
    assert float(value) == pytest.approx(pixels + 2 * edges + 1e-3 * kl, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-5)


SMALL = {
    "vae": {"channels": (8, 8), "groups": 4},
    "unet": {"channels": (8, 16), "transformers": (True, False), "heads": (2, 2), "groups": 4},
    "text_encoder": {"depth": 1},
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Latents of the pictures that the batch below asks for, as the root of a stage."""
    root, vae = tmp_path_factory.mktemp("root"), Autoencoder(**SMALL["vae"], depth=1)
    rng = np.random.default_rng(0)
    # Drawn by NumPy: initializing for real would compile every layer.
    params = jax.tree.map(
        lambda x: rng.normal(scale=0.1, size=x.shape).astype(np.float32), shapes_of(vae)
    )
    scene_latents.write(vae, params, 3, 4, 16, root / "latents")
    return root


@pytest.mark.parametrize("config", [world_autoencoder, world_diffusion])
def test_its_stages_take_a_step_that_leaves_frozen_parts_alone(config, latents, tmp_path):
    stage = config.get_config()
    stage.init = {}
    for name, part in stage.parts.items():
        part.fields |= SMALL[name]
    stage.data.root = str(latents)
    stage.data.caption_tokenizer = str(clip_vocabulary.write(tmp_path / "clip"))
    stage.data.examples, stage.data.image, stage.unroll = 4, {"size": 16}, 1
    form = batch_format.find(stage.data)
    records = [Record(Example(f"3-{i}"), "s", 0, i, 0) for i in range(4)]
    batch, _ = form.fill(form.plan(records, Mode()), slice(None), Mode())
    made = Trainer(System.build(stage, mesh.make({}, jax.devices()[:1])))
    state = made.initial_state()
    before = jax.tree.map(np.asarray, state)
    for _ in range(2):  # the first step's rate is almost 0
        state, metrics = made.step(state, batch)
    assert np.isfinite(float(metrics["loss"]))
    trains = {"world_autoencoder": {"vae"}, "world_diffusion": {"unet"}}
    assert state.trainable.keys() == trains[stage.name]
    for part, tree in state.trainable.items():
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), tree, before.trainable[part])
        assert any(jax.tree.leaves(moved)), part
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before.frozen)


def test_a_picture_of_one_color_counts_evenly():
    images = np.full((1, 4, 4, 3), 0.3, np.float32)
    np.testing.assert_allclose(autoencoder.salience(images, 0.2), 1.2, rtol=1e-5)
