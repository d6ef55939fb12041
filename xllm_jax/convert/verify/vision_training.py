"""Recorded training of BLIP-2's first stage: learning rates, and AdamW step by step."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.tolerances import NOISES, SHARE
from xllm_jax.convert.verify.vision_model import Reference, contrast_table
from xllm_jax.convert.verify.vision_stage1 import LOSSES, inputs, negatives_of
from xllm_jax.core import optim
from xllm_jax.core.stage import Optimizer
from xllm_jax.core.types import Params
from xllm_jax.objectives import blip2_pretraining

SURE = 1e-6  # gradients below are rounding, which Adam blows up to whole steps


def schedules(replay: Replay, reference: Reference) -> None:
    """Learning rates of every recorded schedule, to nine digits."""
    for case in reference.info["lr"]["schedules"]:
        replay.attempt(_schedule, case)


def _schedule(replay: Replay, case: dict[str, Any]) -> None:
    name, per_epoch = case["name"], case["iters_per_epoch"]
    steps = replay.input(f"{name}_step")
    replay.compare(f"{name}_epoch", steps // per_epoch)
    replay.compare(f"{name}_iter", steps % per_epoch)
    with jax.enable_x64(True):
        schedule = optim.epoch_cosine(
            case["init_lr"],
            case["min_lr"],
            case["warmup_start_lr"],
            case["warmup_steps"],
            per_epoch,
            per_epoch * case["max_epoch"],
        )
        rates = np.asarray(schedule(steps))
    replay.compare(f"{name}_lr", rates, allowed=1e-9 * replay.recorded(f"{name}_lr"))


def adamw(replay: Replay, reference: Reference) -> None:
    """Losses and parameters after every step, from the pairs of the recorded values."""
    gradients = reference.other("cases_stage1_grads.npz")
    model, params = reference.contrast
    features, ids, mask = inputs(reference.other("cases_stage1.npz"), reference)
    settings = reference.config["adamw"]

    @jax.jit
    def differentiate(params, negatives):
        run = functools.partial(
            blip2_pretraining.pair_loss, start=reference.start, negatives=negatives
        )
        loss = lambda params: run(model, params, features, ids, mask)  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    state, passed = None, 0.0
    for number, rate in enumerate(settings["lr_steps"]):
        negatives = negatives_of(replay, f"step{number}")
        (total, metrics), gradient = differentiate(params, negatives)
        replay.compare(f"step{number}_loss", total)
        for theirs, ours in LOSSES:
            replay.compare(f"step{number}_loss_{theirs}", metrics[ours])
        transformation, _ = optim.make(_adamw(settings, rate), params, len(settings["lr_steps"]))
        state = jax.jit(transformation.init)(params) if state is None else state
        params, state = _updated(transformation, gradient, state, params)
        passed += rate
        tensors = export_tree(contrast_table(model), params)
        for name in replay.names(f"step{number}_after.*"):
            tensor = name.removeprefix(f"step{number}_after.")
            true = gradients.recorded(f"grad.{tensor}")
            replay.compare(name, tensors[tensor], allowed=_allowed(replay, name, true, 2 * passed))


@functools.partial(jax.jit, static_argnums=0)
def _updated(transformation: Any, gradient: Params, state: Any, params: Params) -> Any:
    """(parameters, state) after one step."""
    updates, state = transformation.update(gradient, state, params)
    return jax.tree.map(jnp.add, params, updates), state


def _adamw(settings: dict[str, Any], rate: float) -> Optimizer:
    return Optimizer(
        schedule="constant",
        peak=rate,
        b1=settings["betas"][0],
        b2=settings["betas"][1],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        no_decay=optim.NO_DECAY,
    )


def _allowed(replay: Replay, name: str, gradient: np.ndarray, moved: float) -> np.ndarray:
    """The measured noise; all that the steps can move where the true gradient is zero."""
    measured = replay.tolerances.listed.get(replay.path.name, {}).get(name) or {}
    noise = measured.get("max_abs_where_grad_gt_1e-6")
    strict = max(NOISES * (noise or 0.0), SHARE * np.abs(replay.recorded(name)).max())
    sure = (np.abs(gradient) > SURE) & (not name.endswith(".self.key.bias"))
    return np.where(sure, strict, moved)
