"""Schedulers: ways whose ends are known, and configurations that are refused by field."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.models.outputs import sampling
from xllm_jax.models.outputs.scheduler_config import KINDS, parse

PUBLISHED = dict(
    _class_name="PNDMScheduler",
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
    clip_sample=False,
)
SPACINGS, PREDICTIONS = ("leading", "linspace", "trailing"), ("epsilon", "v_prediction")


# The steps of 'linspace' are not 1000 // steps apart, as PNDM and DDIM take them to be.
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "name, spacing",
    [(n, s) for n in KINDS for s in SPACINGS if s != "linspace" or n in ("euler", "dpmpp_2m")],
)
def test_who_knows_the_picture_draws_it(name, spacing, prediction):
    """With the exact noise or v of one picture, every way ends at this picture."""
    config = PUBLISHED | dict(timestep_spacing=spacing, prediction_type=prediction)
    scheduler = parse(config, name)
    picture = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 4)), jnp.float32)
    alphas = jnp.asarray(scheduler.alphas(), jnp.float32)

    def knows(x, time):
        kept = jnp.interp(time[0], jnp.arange(1000.0), alphas)
        if name == "euler":  # interpolates noise levels, not shares
            levels = jnp.sqrt((1 - alphas) / alphas)
            kept = 1 / (jnp.interp(time[0], jnp.arange(1000.0), levels) ** 2 + 1)
        noise = (x - jnp.sqrt(kept) * picture) / jnp.sqrt(1 - kept)
        if prediction == "epsilon":
            return noise
        return jnp.sqrt(kept) * noise - jnp.sqrt(1 - kept) * picture

    noise = jax.random.normal(jax.random.key(1), picture.shape)
    for steps in (10, 30):
        found, _ = sampling.draw(scheduler.table(steps), knows, noise)
        # PNDM and DDIM leave the noise of step 0.
        left = 0.0 if name in ("euler", "dpmpp_2m") else float(np.sqrt(1 - alphas[0]))
        np.testing.assert_allclose(found, picture, atol=2e-3 + 4 * left)


def test_defaults_are_those_of_each_class():
    assert parse({"_class_name": "DDIMScheduler"}).clip_range == 1.0
    assert parse(PUBLISHED, "ddim").clip_range == np.inf
    spacings = {name: parse(PUBLISHED, name).spacing for name in KINDS}
    assert spacings == dict(pndm="leading", ddim="leading", euler="linspace", dpmpp_2m="linspace")


def test_few_steps_have_a_way_too():
    for name in KINDS:
        for steps in (1, 2, 3):
            table = parse(PUBLISHED, name).table(steps)
            assert all(np.isfinite(column).all() for column in table.calls)
            assert len(table.calls.time) == steps + (name == "pndm" and steps > 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(_class_name="HeunDiscreteScheduler"), "_class_name: is 'HeunDiscreteScheduler'"),
        (dict(beta_schedule="squaredcos_cap_v2"), "beta_schedule: is 'squaredcos_cap_v2'"),
        (dict(prediction_type="sample"), "prediction_type: is 'sample'"),
        (dict(timestep_spacing="karras"), "timestep_spacing: is 'karras'"),
        (dict(trained_betas=[0.1, 0.2]), "trained_betas: is"),
        (dict(skip_prk_steps=False), "skip_prk_steps: is False, and only True"),
        (dict(num_train_timesteps="1000"), "num_train_timesteps: is '1000'"),
        (dict(beta_start=-1.0), "beta_start: is -1.0"),
        (dict(beta_end=float("nan")), "beta_end: is nan"),
        (dict(steps_offset=1.5), "steps_offset: is 1.5"),
    ],
)
def test_what_is_not_computed_is_refused_by_field(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        parse(PUBLISHED | changes)
    assert "\n" not in str(raised.value)


def test_pndm_without_its_default_is_refused():
    with pytest.raises(UserError, match="skip_prk_steps"):
        parse({"_class_name": "PNDMScheduler"})


def test_names_and_numbers_of_a_request_are_refused():
    with pytest.raises(UserError, match="--scheduler: unknown scheduler 'ddpm'"):
        parse(PUBLISHED, "ddpm")
    for steps in (0, -3, 1000, 1001):
        for name in ("pndm", "ddim"):
            with pytest.raises(UserError, match="--steps"):
                parse(PUBLISHED, name).table(steps)
    with pytest.raises(UserError, match="is no configuration"):
        parse([])  # pyright: ignore[reportArgumentType]


def test_guidance_goes_beyond_the_condition():
    conditions, without = jnp.ones((2, 3, 4)), jnp.zeros((3, 4))
    seen = []

    def network(x, time, text):
        seen.append(x.shape)
        return x * 0 + text.mean((1, 2))[:, None]

    x, time = jnp.zeros((2, 5)), jnp.zeros(2)
    for scale in (1.0, 7.5):
        found = sampling.guided(network, conditions, without, scale)(x, time)
        np.testing.assert_allclose(found, scale)
    assert set(seen) == {(4, 5)}


def test_a_table_is_an_argument_of_one_program():
    compiled = []

    def denoise(x, time):
        compiled.append(None)
        return 0.3 * x

    program = jax.jit(lambda table, noise: sampling.draw(table, denoise, noise)[0])
    noise = jnp.ones((1, 2))
    tables = [parse(PUBLISHED, name).table(9) for name in ("ddim", "euler", "dpmpp_2m")]
    made = [program(table, noise) for table in tables]
    assert len(compiled) == 1
    assert len({float(one[0, 0]) for one in made}) == 3
