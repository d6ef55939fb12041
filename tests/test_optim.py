"""Schedules, weight decay and AdamW, and the accumulation of micro-batches."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xllm_jax.convert import export_tree
from xllm_jax.convert.verify.vision_model import Reference, contrast_table, interface_table
from xllm_jax.core import optim, rules, sampling
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Optimizer


def settings(**fields) -> Optimizer:
    """The stage's own settings class with some fields set."""
    return Optimizer(**fields)


@pytest.mark.golden
def test_weight_decay_reaches_the_recorded_parameters(golden):
    cases = json.loads((golden / "vision/cases_weight_decay.json").read_text())
    reference = Reference(golden / "vision")
    stage1, params = reference.contrast
    groups = decayed(params, contrast_table(stage1))
    assert groups == recorded(cases["stage1 XLLMQformer / xllm runner_base.RunnerBase.optimizer"])
    temperature_too = [pattern for pattern in optim.NO_DECAY if "temperature" not in pattern]
    groups = decayed(params, contrast_table(stage1), temperature_too)
    lavis = "stage1 Blip2Qformer / lavis blip2.Blip2Base.get_optimizer_params"
    assert groups == recorded(cases[lavis])
    stage2, params = reference.interface()
    groups = decayed(params, interface_table(stage2))
    assert groups == recorded(cases["stage2 XLLMImage / xllm runner_base.RunnerBase.optimizer"])
    video = recorded(cases["stage2 XLLMVideo / xllm runner_base.RunnerBase.optimizer"])
    names = {
        "queries": ("query_tokens", "video_query_tokens"),
        "adapter/kernel": ("opt_proj.weight", "video_proj.weight"),
        "adapter/bias": ("opt_proj.bias", "video_proj.bias"),
    }
    mask = rules.flatten(optim.decay_mask(params))
    assert video == {name: mask[path] for path, both in names.items() for name in both}
    defaults = cases["defaults when the yaml has no beta2 (no X-LLM or BLIP-2 yaml has)"]
    assert defaults["eps"] == Optimizer().eps and defaults["betas"][0] == Optimizer().b1


def decayed(params, table, no_decay=optim.NO_DECAY) -> dict[str, bool]:
    """{the reference's parameter name: whether it decays}."""
    mask = optim.decay_mask(params, no_decay)
    whole = jax.tree.map(lambda leaf, decays: np.full(np.shape(leaf), decays), params, mask)
    tensors = export_tree(table, whole)
    assert all(np.all(tensor) == np.any(tensor) for tensor in tensors.values())
    return {name: bool(np.all(tensor)) for name, tensor in tensors.items()}


def recorded(groups) -> dict[str, bool]:
    """The recorded parameter groups in the same form."""
    return {name: group["weight_decay"] > 0 for group in groups for name in group["params"]}


def test_cosine_starts_warm_peaks_and_ends_at_the_minimum():
    schedule = optim.cosine(3e-5, 1e-8, 1e-6, warmup_steps=10, total_steps=110)
    steps = np.arange(111)
    rates = np.asarray(jax.jit(schedule)(steps))
    np.testing.assert_allclose(rates[[0, 5, 10, 60, 110]], [1e-6, 1.55e-5, 3e-5, 1.5005e-5, 1e-8])
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)
    flat = optim.constant(1e-3, warmup_from=0.0, warmup_steps=2)
    np.testing.assert_allclose(flat(np.array([0, 1, 2, 9])), [0, 5e-4, 1e-3, 1e-3])


def test_bad_settings_are_told():
    with pytest.raises(UserError, match="unknown schedule"):
        optim.make(settings(schedule="cosin"), {}, 10)
    with pytest.raises(UserError, match="accumulation"):
        optim.make(settings(accumulation=0), {}, 10)
    with pytest.raises(UserError, match="steps_per_epoch"):
        optim.make(settings(schedule="epoch_cosine"), {}, 10)
    with pytest.raises(UserError, match="minimum"):
        optim.make(settings(schedule="tri_stage", minimum=0.0), {}, 10)


def test_a_new_epoch_begins_at_its_first_step():
    """Compiled, as in training: at lengths such as 41 and 47 the quotient once fell below 1."""
    wrong = []
    for length in (1, 2, 3, 41, 47, 55, 61, 64, 82, 83):
        schedule = jax.jit(optim.epoch_cosine(1.0, 0.0, 1.0, 0, length, 4 * length))
        steps = jnp.asarray([length - 1, length, 2 * length - 1, 2 * length, 3 * length])
        epochs = np.asarray(steps) // length
        wanted = np.where(epochs < 1, 1.0, (1 + np.cos(np.pi * epochs / 4)) / 2)
        wrong += [length] if np.abs(np.asarray(schedule(steps)) - wanted).max() > 1e-6 else []
    assert wrong == []


def test_places_are_spread_by_integers():
    """Against fractions; the floor of a float misses some of these places."""
    wrong, rough = [], 0
    for size in (1, 2, 3, 7, 50, 99, 100, 1000, 4097):
        for most in (1, 2, 5, 30, 50, 99, 100, 1000):
            found, count = sampling.evenly(size, most), min(size, most)
            exact = [Fraction(i * (size - 1), max(count - 1, 1)) for i in range(count)]
            wrong += [] if found == [math.floor(place) for place in exact] else [(size, most)]
            rough += int((np.linspace(0, size - 1, count).astype(int) != found).sum())
    assert wrong == [] and sampling.evenly(0, 5) == []
    assert rough > 0


@pytest.mark.parametrize("name", ["cosine", "tri_stage", "constant", "epoch_cosine"])
def test_compiled_schedules_are_those_of_exact_arithmetic(name):
    """At every phase's first and last update, in float64 by hand; steps as the optimizer counts."""
    for warm, hold, decay in ((3, 4, 41), (7, 5, 47), (41, 41, 82), (55, 3, 61)):
        fields = dict(peak=1.0, minimum=0.01, warmup_from=0.1, warmup_steps=warm)
        if name != "constant":
            fields |= dict(hold_steps=hold, decay_steps=decay, steps_per_epoch=decay)
        total = warm + hold + decay
        schedule = jax.jit(optim.make_schedule(settings(schedule=name, **fields), total))
        steps = np.unique([0, warm - 1, warm, warm + hold, decay - 1, decay, total - 1, total])
        found = np.asarray(schedule(jnp.asarray(steps, jnp.int32)))
        wanted = [exact_rate(name, int(s), warm, hold, decay, total) for s in steps]
        np.testing.assert_allclose(found, wanted, rtol=2e-5)


def exact_rate(name, step, warm, hold, decay, total) -> float:
    """The rate as the docstrings of the schedules say it, from 0.1 to 1 and down to 0.01."""
    rise, cosine = 0.1 + 0.9 * step / warm, lambda x: 0.01 + 0.495 * (1 + math.cos(math.pi * x))
    if name == "epoch_cosine":
        epoch = step // decay
        return min(rise, 1.0) if epoch < 1 else cosine(min(epoch * decay / total, 1))
    if step < warm:
        return rise
    if name == "tri_stage":
        return 0.01 ** min(max((step - warm - hold) / decay, 0), 1)
    return 1.0 if name == "constant" else cosine((step - warm) / (total - warm))


def test_accumulated_micro_batches_are_one_update_of_their_mean():
    params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
    gradients = [
        jax.tree.map(
            lambda leaf, seed=seed: jax.random.normal(jax.random.key(seed), leaf.shape), params
        )
        for seed in range(4)
    ]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *gradients)
    fields = dict(schedule="constant", peak=0.1, weight_decay=0.5, clip=0.3)
    whole, _ = optim.make(settings(**fields), params, 10)
    parts, _ = optim.make(settings(**fields, accumulation=4), params, 10)
    update, _ = whole.update(mean, whole.init(params), params)
    state, accumulated = parts.init(params), params
    for gradient in gradients:
        step, state = parts.update(gradient, state, accumulated)
        accumulated = optax.apply_updates(accumulated, step)
    expected = optax.apply_updates(params, update)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), accumulated, expected)


def test_adamw_is_torchs_and_biases_do_not_decay():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).normal(size=(3, 4, 3)).astype(np.float32)
    kernel, bias = torch.nn.Parameter(torch.tensor(values[0])), torch.nn.Parameter(torch.ones(3))
    groups = [{"params": [kernel], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    peer = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-8)
    params = {"dense": {"kernel": jnp.asarray(values[0]), "bias": jnp.ones(3)}}
    fields = settings(schedule="constant", peak=0.1, weight_decay=0.3)
    transformation, _ = optim.make(fields, params, 5)
    state = transformation.init(params)
    for value in values:
        kernel.grad, bias.grad = torch.tensor(value), torch.tensor(value[0])
        peer.step()
        gradient = {"dense": {"kernel": jnp.asarray(value), "bias": jnp.asarray(value[0])}}
        update, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, update)
    np.testing.assert_allclose(params["dense"]["kernel"], kernel.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(params["dense"]["bias"], bias.detach().numpy(), atol=1e-6)


def test_norms_biases_and_the_temperature_do_not_decay():
    tree = {"norm": {"scale": 1.0}, "out": {"kernel": 1.0, "bias": 1.0}, "temperature": 1.0}
    mask = optim.decay_mask(tree)
    assert mask == {
        "norm": {"scale": False},
        "out": {"kernel": True, "bias": False},
        "temperature": False,
    }
