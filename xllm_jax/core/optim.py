"""Learning-rate schedules, the AdamW chain and accumulation; the one home of optax.

Steps count optimizer updates, from 0: `schedule(0)` is the rate of the first update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from xllm_jax.core import rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import NO_DECAY, Optimizer
from xllm_jax.core.types import Params

Step = jax.typing.ArrayLike
Schedule = Callable[[Step], jax.Array]
Transformation = optax.GradientTransformationExtraArgs


def cosine(
    peak: float, minimum: float, warmup_from: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Linear warm-up, then half a cosine down to `minimum` at `total_steps` (the paper's A.3).

    Args:
      peak, minimum, warmup_from: learning rates.
      warmup_steps: updates until the peak.
      total_steps: updates in all.
    """
    length = max(total_steps - warmup_steps, 1)

    def schedule(step: Step) -> jax.Array:
        step = _float(step)
        rate = _half_cosine(peak, minimum, (step - warmup_steps) / length)
        return jnp.where(step < warmup_steps, _warmup(peak, warmup_from, warmup_steps, step), rate)

    return schedule


def epoch_cosine(
    peak: float,
    minimum: float,
    warmup_from: float,
    warmup_steps: int,
    steps_per_epoch: int,
    total_steps: int,
) -> Schedule:
    """The schedule of LAVIS and of X-LLM's code (`xllm/common/optims.py`).

    The warm-up goes by step and only within epoch 0; from epoch 1 on the cosine is evaluated at the
    whole epoch, so that the rate is a staircase and an unfinished warm-up is skipped.

    Args:
      peak, minimum, warmup_from: learning rates.
      warmup_steps: updates until the peak.
      steps_per_epoch: updates an epoch.
      total_steps: updates in all.
    """
    if steps_per_epoch < 1:
        raise UserError("needs steps_per_epoch", field="optimizer.schedule", hint="Set it to 1 up")
    epochs = total_steps / steps_per_epoch

    def schedule(step: Step) -> jax.Array:
        # In integers: compiled, a float quotient of 41 / 41 may lie below 1.
        epoch = _float(jnp.asarray(step).astype(int) // steps_per_epoch)
        warm = jnp.minimum(_warmup(peak, warmup_from, warmup_steps, _float(step)), peak)
        return jnp.where(epoch < 1, warm, _half_cosine(peak, minimum, epoch / epochs))

    return schedule


def tri_stage(
    peak: float,
    minimum: float,
    warmup_from: float,
    warmup_steps: int,
    hold_steps: int,
    decay_steps: int,
) -> Schedule:
    """Linear warm-up, constant, exponential decay to `minimum`, constant (fairseq's tri-stage).

    Args:
      peak, minimum, warmup_from: learning rates.
      warmup_steps, hold_steps, decay_steps: updates of the three phases.
    """

    def schedule(step: Step) -> jax.Array:
        step = _float(step)
        done = jnp.clip((step - warmup_steps - hold_steps) / max(decay_steps, 1), 0, 1)
        rate = peak * jnp.exp(math.log(minimum / peak) * done)
        return jnp.where(step < warmup_steps, _warmup(peak, warmup_from, warmup_steps, step), rate)

    return schedule


def linear(
    peak: float, minimum: float, warmup_from: float, warmup_steps: int, total_steps: int
) -> Schedule:
    """Linear warm-up, then linear decay to `minimum` at the last update.

    Args:
      peak, minimum, warmup_from: learning rates.
      warmup_steps, total_steps: updates of the warm-up, and of all.
    """
    length = max(total_steps - warmup_steps, 1)

    def schedule(step: Step) -> jax.Array:
        step = _float(step)
        left = 1 - jnp.clip((step - warmup_steps) / length, 0, 1)
        rate = minimum + (peak - minimum) * left
        return jnp.where(step < warmup_steps, _warmup(peak, warmup_from, warmup_steps, step), rate)

    return schedule


def constant(peak: float, warmup_from: float = -1.0, warmup_steps: int = 0) -> Schedule:
    """Linear warm-up, then `peak`.

    Args:
      peak: the learning rate.
      warmup_from: the first one; negative means no warm-up.
      warmup_steps: updates until the peak.
    """

    def schedule(step: Step) -> jax.Array:
        step = _float(step)
        return jnp.where(step < warmup_steps, _warmup(peak, warmup_from, warmup_steps, step), peak)

    return schedule


def make_schedule(settings: Optimizer, total_steps: int) -> Schedule:
    """Builds the schedule that `settings` names, of `total_steps` updates.

    Raises:
      UserError: an unknown name, or lengths that the schedule cannot use.
    """
    warmup = {"warmup_from": settings.warmup_from, "warmup_steps": settings.warmup_steps}
    ends = {"peak": settings.peak, "minimum": settings.minimum}
    if settings.schedule == "cosine":
        return cosine(**ends, **warmup, total_steps=total_steps)
    if settings.schedule == "linear":
        return linear(**ends, **warmup, total_steps=total_steps)
    if settings.schedule == "epoch_cosine":
        per_epoch = settings.steps_per_epoch
        return epoch_cosine(**ends, **warmup, steps_per_epoch=per_epoch, total_steps=total_steps)
    if settings.schedule == "tri_stage":
        if not 0 < settings.minimum <= settings.peak:
            raise UserError("must lie between 0 and the peak", field="optimizer.minimum")
        lengths = {"hold_steps": settings.hold_steps, "decay_steps": settings.decay_steps}
        return tri_stage(**ends, **warmup, **lengths)
    if settings.schedule == "constant":
        return constant(settings.peak, **warmup)
    raise UserError(
        f"unknown schedule {settings.schedule!r}",
        field="optimizer.schedule",
        hint="Use 'cosine', 'linear', 'epoch_cosine', 'tri_stage' or 'constant'",
    )


def decay_mask(params: Params, no_decay: Iterable[str] = NO_DECAY) -> Params:
    """Tree of bools: True where weight decay applies, False where a pattern matches the path."""
    patterns = tuple(no_decay)
    return rules.unflatten(
        {
            path: not any(re.fullmatch(pattern, path) for pattern in patterns)
            for path in rules.flatten(params)
        }
    )


def make(
    settings: Optimizer, params: Params, total_steps: int, terms: int = 1
) -> tuple[Transformation, Schedule]:
    """Builds clip -> AdamW -> schedule, over averaged micro-batches.

    With `accumulation` n, n - 1 calls of `update` return zeros and the n-th the update of the mean
    gradient (`accumulate`); the schedule counts only those. Decay is decoupled (rate *
    decay * parameter).

    Args:
      settings: clip, moments, decay, schedule and accumulation.
      params: the trainable tree; only paths are read.
      total_steps: updates in all.
      terms: of the loss, each with a normalizer of its own.

    Returns:
      (optax transformation, schedule for logging).

    Raises:
      UserError: a setting without sense.
    """
    if settings.accumulation < 1:
        raise UserError("must be at least 1", field="optimizer.accumulation")
    if settings.averaging not in ("tokens", "micro_batches"):
        what = f"unknown average {settings.averaging!r}"
        hint = "Use 'tokens' or 'micro_batches'"
        raise UserError(what, field="optimizer.averaging", hint=hint)
    schedule = make_schedule(settings, total_steps)
    mask = decay_mask(params, settings.no_decay)
    chain = [optax.clip_by_global_norm(settings.clip)] if settings.clip else []
    chain += [
        optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
        optax.add_decayed_weights(settings.weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    ]
    transformation = optax.with_extra_args_support(optax.chain(*chain))
    if settings.accumulation > 1:
        weighted = settings.averaging == "tokens"
        transformation = accumulate(transformation, settings.accumulation, terms, weighted)
    return transformation, schedule


class Accumulation(NamedTuple):
    """The state between two updates; the first five fields are those of `optax.MultiStepsState`.

    The mean of the micro-batches' means is not the mean over their tokens: one of 110 supervised
    tokens would weigh as much as one of 156. The weighted mean is carried in the buffers that a
    plain one needs, and is the plain one where all weights are equal.

    Attributes:
      mini_step: micro-batches since the last update.
      gradient_step: updates so far.
      inner_opt_state: of the optimizer that is given the mean.
      acc_grads: mean gradient, so far, of the first term of the loss.
      skip_state: always empty.
      weights: `[terms]` float32, what each term's mean is over; negative = as many micro-batches
        as `mini_step` says, of a run that did not count what they hold.
      others: mean gradients of the other terms.
    """

    mini_step: jax.Array
    gradient_step: jax.Array
    inner_opt_state: optax.OptState
    acc_grads: Params
    skip_state: tuple[()]
    weights: jax.Array
    others: tuple[Params, ...]


def accumulate(
    inner: optax.GradientTransformation, count: int, terms: int = 1, weighted: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Gives `inner` the mean gradient of `count` micro-batches; the calls between return zeros.

    Its `update(gradients, state, params, weights=None)` takes one tree, or a tuple of one for each
    term of the loss where there are several, and what each term is a mean over, `[terms]`: a term's
    gradients are averaged by these weights, and the terms' means are added.

    Args:
      inner: optimizer.
      count: micro-batches an update.
      terms: of the loss, each with a normalizer of its own.
      weighted: False lets every micro-batch weigh the same, whatever `weights` says.
    """
    terms = terms if weighted else 1

    def init(params: optax.Params) -> Accumulation:
        zero = jnp.zeros((), jnp.int32)
        first, *others = (optax.tree.zeros_like(params, dtype=jnp.float32) for _ in range(terms))
        weights = jnp.zeros(terms)
        return Accumulation(zero, zero, inner.init(params), first, (), weights, tuple(others))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        weights: jax.Array | None = None,
        **_: object,
    ) -> tuple[optax.Updates, optax.OptState]:
        assert isinstance(state, Accumulation)
        here = weights if weighted and weights is not None else jnp.ones(terms)
        parts: tuple = updates if isinstance(updates, tuple) else (updates,)
        sums, after = _added(state, parts, here)
        mean = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *sums)
        mean = optax.tree.cast_like(mean, parts[0])
        ready = state.mini_step == count - 1
        made, following = inner.update(mean, state.inner_opt_state, params)
        first, *others = (jax.tree.map(lambda leaf: (1 - ready) * leaf, tree) for tree in sums)
        following = jax.tree.map(
            lambda new, old: jnp.where(ready, new, old), following, state.inner_opt_state
        )
        step, number = (state.mini_step + 1) % count, state.gradient_step + ready
        state = Accumulation(
            *(step, number, following, first, ()), (1 - ready) * after, tuple(others)
        )
        return jax.tree.map(lambda leaf: ready * leaf, made), state

    return optax.GradientTransformationExtraArgs(init, update)


def _added(
    state: Accumulation, parts: tuple[Params, ...], weights: jax.Array
) -> tuple[list[Params], jax.Array]:
    """(each term's mean gradient with the new one, what it is over)."""
    before = jnp.where(state.weights < 0, state.mini_step * weights, state.weights)
    after = before + weights
    some = weights > 0  # nothing joins where the micro-batch holds nothing
    shares = jnp.where(some, after / jnp.where(some, weights, 1.0), jnp.inf)
    groups = zip((state.acc_grads, *state.others), parts, shares, strict=True)
    means = [jax.tree.map(lambda a, b, s=s: a + (b - a) / s, old, new) for old, new, s in groups]
    return means, after


def terms_of(state: optax.OptState) -> int:
    """How many gradients, one for each term of the loss, an optimizer with this state takes."""
    return 1 + len(state.others) if isinstance(state, Accumulation) else 1


def older(state: optax.OptState) -> optax.OptState:
    """The shape in which runs were saved that did not weigh their micro-batches."""
    if not isinstance(state, Accumulation):
        return state
    return optax.MultiStepsState(*state[:5])


def continued(saved: optax.OptState, fresh: optax.OptState) -> optax.OptState:
    """The state of a run that did not weigh its micro-batches: those of the update under way
    weigh as much as the next one.

    Args:
      saved: in the shape of `older`.
      fresh: an initial state, for what is new.
    """
    if not isinstance(fresh, Accumulation) or not isinstance(saved, optax.MultiStepsState):
        return saved
    unknown = jnp.full_like(fresh.weights, -1.0)
    return fresh._replace(**saved._asdict(), weights=unknown)


def abstract_state(
    optimizer: Transformation, params: Params, whole: NamedSharding
) -> optax.OptState:
    """Shapes of the optimizer's state; every moment is sharded as its parameter.

    Args:
      optimizer: of `make`.
      params: the trainable tree, `jax.ShapeDtypeStruct` with shardings.
      whole: sharding of what belongs to no parameter (counters).
    """
    shardings = {(leaf.shape, path): leaf.sharding for path, leaf in rules.flatten(params).items()}

    def place(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.ShapeDtypeStruct:
        names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        sharding = shardings.get((leaf.shape, "/".join(names)), whole)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(optimizer.init, params)
    return jax.tree_util.tree_map_with_path(place, state)


def _float(step: Step) -> jax.Array:
    return jnp.asarray(step, float)  # float64 where it is enabled


def _warmup(peak: float, start: float, steps: int, step: jax.Array) -> jax.Array:
    """Linear from `start` to `peak`; a negative start means that there is no warm-up."""
    start = peak if start < 0 else start
    return start + (peak - start) * step / max(steps, 1)


def _half_cosine(peak: float, minimum: float, done: jax.Array) -> jax.Array:
    return minimum + 0.5 * (peak - minimum) * (1 + jnp.cos(math.pi * jnp.clip(done, 0, 1)))
