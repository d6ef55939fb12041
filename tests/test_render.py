"""Drawing: one seed one picture, one program for all requests, and requests that are refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.inference.render import Renderer, fitted
from xllm_jax.models.outputs import scheduler_config
from xllm_jax.models.outputs.autoencoder import Autoencoder
from xllm_jax.models.outputs.unet import UNet

SIZE, TOKENS, WIDTH = (16, 24), 5, 12
CONFIG = dict(_class_name="DDIMScheduler", beta_schedule="scaled_linear", clip_sample=False)


class Counted(Renderer):
    """Counts the programs that it traces."""

    count = 0

    def _latents(self, *args, **options):
        self.count += 1
        return super()._latents(*args, **options)

    def _pictures(self, *args):
        self.count += 1
        return super()._pictures(*args)


@pytest.fixture(scope="module")
def renderer() -> Counted:
    unet = UNet(
        channels=(8, 8),
        transformers=(True, False),
        heads=(2, 2),
        depth=1,
        text_width=WIDTH,
        groups=4,
    )
    vae = Autoencoder(channels=(8, 8), depth=1, groups=4)
    params = {
        name: net.init(jax.random.key(3), *net.example())["params"]
        for name, net in (("unet", unet), ("vae", vae))
    }
    without = np.zeros((TOKENS, WIDTH), np.float32)
    return Counted(unet, vae, params, scheduler_config.parse(CONFIG), without, batch=3)


def asked(count: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, TOKENS, WIDTH)).astype(np.float32)


def test_a_seed_gives_the_same_picture_whatever_the_batch(renderer):
    conditions, seeds = asked(5), [7, 8, 9, 7, 2**32 - 1]
    together = renderer(conditions, seeds, size=SIZE, steps=4)
    assert together.shape == (5, *SIZE, 3) and together.dtype == np.uint8
    for row, seed in enumerate(seeds):
        alone = renderer(conditions[row : row + 1], [seed], size=SIZE, steps=4)
        np.testing.assert_array_equal(alone[0], together[row])
    order = [4, 2, 0, 1]
    turned = renderer(conditions[order], [seeds[n] for n in order], size=SIZE, steps=4)
    np.testing.assert_array_equal(turned, together[order])
    noise = np.asarray(renderer.noise([7, 7, 8], SIZE))
    np.testing.assert_array_equal(noise[0], noise[1])
    assert np.abs(noise[0] - noise[2]).mean() > 0.5 and 0.8 < noise.std() < 1.2


def test_renderers_of_other_batches_draw_the_same(renderer):
    """Within one of 256 levels: another program may round another way."""
    conditions, seeds = asked(3), [7, 8, 9]
    drawn = renderer(conditions, seeds, size=SIZE, steps=4)
    given = (renderer.unet, renderer.autoencoder, renderer.params, renderer.scheduler)
    for batch in (1, 16):
        other = Renderer(*given, renderer.without, batch=batch)
        again = other(conditions, seeds, size=SIZE, steps=4)
        assert np.abs(again.astype(int) - drawn).max() <= 1
        assert (again[0] != again[1]).any()  # the order counts


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_a_picture_drawn_call_by_call_is_the_same(renderer, guidance):
    """Within one of 256 levels: another program may round another way."""
    conditions, seeds = asked(2), [7, 8]
    options = {"size": SIZE, "steps": 4, "guidance": guidance}
    *calls, drawn = renderer.gradually(conditions, seeds, **options)
    assert calls == [None] * 4
    whole = renderer(conditions, seeds, **options)
    assert np.abs(drawn.astype(int) - whole).max() <= 1 and drawn.dtype == np.uint8
    *_, alone = renderer.gradually(conditions[1:], seeds[1:], **options)
    np.testing.assert_array_equal(alone[0], drawn[1])
    with pytest.raises(ValueError, match="4 pictures"):
        next(renderer.gradually(asked(4), [1] * 4, **options))


def test_requests_of_a_size_share_a_program(renderer):
    renderer(asked(1), [1], size=SIZE, steps=4)
    before = renderer.count
    renderer(asked(3), [1, 2, 3], size=SIZE, steps=4, guidance=3.0)
    renderer(asked(4), [4] * 4, size=SIZE, steps=4, guidance=9.0)
    assert renderer.count == before
    renderer(asked(1), [1], size=(32, 32), steps=4)
    assert renderer.count == before + 2  # latents and their decoder


def test_conditions_and_guidance_matter(renderer):
    conditions = asked(2)
    drawn = {
        scale: renderer(conditions, [1, 1], size=SIZE, steps=4, guidance=scale)
        for scale in (1.0, 30.0)
    }
    assert (drawn[1.0] != drawn[30.0]).any() and (drawn[30.0][0] != drawn[30.0][1]).any()
    plain = renderer(renderer.without[None], [1], size=SIZE, steps=4, guidance=30.0)
    unguided = renderer(renderer.without[None], [1], size=SIZE, steps=4, guidance=1.0)
    assert np.abs(plain.astype(int) - unguided).max() <= 1  # nothing to go beyond


def test_no_request_gives_no_picture(renderer):
    assert renderer(asked(0), [], size=SIZE, steps=4).shape == (0, *SIZE, 3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(size=(16, 25)), r"--size: 16 x 25 is no multiple .* factor 2. Nearest: 16 24"),
        (dict(size=(0, 24)), "--size: 0 x 24"),
        (dict(steps=0), "--steps: 0 steps"),
        (dict(seeds=[1]), "--seed: 1 for 2 requests"),
        (dict(seeds=[1, -1]), "--seed: -1 is no whole number"),
        (dict(seeds=[1, 2**32]), "--seed: 4294967296 is no whole number"),
        (dict(conditions=np.zeros((2, TOKENS, WIDTH + 4))), "conditions: have the shape"),
        (dict(conditions=np.zeros((2, TOKENS + 1, WIDTH))), "conditions: have the shape"),
    ],
)
def test_what_cannot_be_drawn_is_refused(renderer, changes, message):
    request = dict(conditions=asked(2), seeds=[1, 2], size=SIZE, steps=4) | changes
    with pytest.raises(UserError, match=message):
        renderer(request.pop("conditions"), request.pop("seeds"), **request)


def test_pictures_are_fitted_to_the_autoencoder():
    picture = np.zeros((19, 30, 3), np.uint8)
    assert fitted(picture, 8).shape == (16, 24, 3)
    assert fitted(picture[:16, :24], 8).shape == (16, 24, 3)
