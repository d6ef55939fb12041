"""Trainer: a system with its loss, its optimizer and the shapes of its state."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Protocol, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from xllm_jax.assembly import adapters, parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import lookup, mesh, optim, rules
from xllm_jax.core.batch import Batch
from xllm_jax.core.stage import Stage
from xllm_jax.core.types import Metrics, Params
from xllm_jax.training import divergence
from xllm_jax.training.step import Loss, TrainState, train_step


class JittedStep(Protocol):
    """A compiled `train_step`: the state is donated."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Runs one micro-batch."""
        ...

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        """The traced step, ready for the compiler."""
        ...

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """The step as a program of JAX."""
        ...


def objective(stage: Stage) -> ModuleType:
    """The file of a stage's objective: `loss`, and where it has means `counts`, `NORMALIZERS`.

    One whose options change the terms of its loss has `normalizers(options)` instead; one that
    needs more of the stage than its options has `prepared(stage)`, further arguments of its loss.

    Raises:
      UserError: there is no such objective.
    """
    return lookup.module("xllm_jax.objectives", stage.objective, "objective")


def normalizers(stage: Stage) -> tuple[str, ...]:
    """What the terms of a stage's loss are means over."""
    file = objective(stage)
    if hasattr(file, "normalizers"):
        return file.normalizers(stage.options)
    return getattr(file, "NORMALIZERS", ("micro-batch",))


def stage_loss(system: System, train: bool = True) -> Loss:
    """The stage's loss with its networks and options filled in; `train` is for dropout and such.

    Raises:
      UserError: the objective finds the stage's settings at odds.
    """
    stage, file = system.stage, objective(system.stage)
    more = file.prepared(stage) if hasattr(file, "prepared") else {}
    loss = functools.partial(file.loss, system.model, train=train, **stage.options, **more)
    if not stage.offload:
        return loss
    return lambda params, batch, key: loss(system.resident(params), batch, key)


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """What trains a system; nothing is allocated before `initial_state`.

    Attributes:
      system: networks and mesh of the stage.
    """

    system: System

    @functools.cached_property
    def loss(self) -> Loss:
        """The stage's loss in training."""
        return stage_loss(self.system)

    @functools.cached_property
    def _halves(self) -> tuple[Params, Params]:
        """Shapes of what trains and of the rest."""
        stage = self.system.stage
        divergence.check(stage.divergence)
        return adapters.split(stage, rules.unflatten(self.system.parameters))

    @functools.cached_property
    def _optimization(self) -> tuple[optim.Transformation, optim.Schedule]:
        stage = self.system.stage
        terms = len(normalizers(stage))
        return optim.make(stage.optimizer, self._halves[0], stage.steps, terms)

    @property
    def optimizer(self) -> optim.Transformation:
        """The optax chain over the trainable half."""
        return self._optimization[0]

    @property
    def schedule(self) -> optim.Schedule:
        """Learning rate of an update's number."""
        return self._optimization[1]

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state, `jax.ShapeDtypeStruct`.

        Raises:
          UserError: the policy for divergence, a pattern or a setting of the optimizer is wrong.
        """
        trainable, frozen = self._halves
        whole = NamedSharding(self.system.device_mesh, PartitionSpec())
        step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
        state = optim.abstract_state(self.optimizer, trainable, whole)
        guard = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            jax.eval_shape(lambda: divergence.initial_guard(self.system.stage.divergence)),
        )
        return TrainState(cast(jax.Array, step), trainable, frozen, state, guard)

    def initial_state(self) -> TrainState:
        """Parameters split by the allow-list, and the optimizer on the trainable half."""
        stage, shardings = self.system.stage, _shardings(self.abstract_state)
        trainable, frozen = adapters.split(stage, parameters.parameters(self.system))
        with jax.set_mesh(self.system.device_mesh):
            initialize = jax.jit(self.optimizer.init, out_shardings=shardings.optimizer)
            optimizer_state = initialize(trainable)
        step = jax.device_put(jnp.zeros((), jnp.int32), shardings.step)
        guard = jax.device_put(divergence.initial_guard(stage.divergence), shardings.guard)
        return TrainState(step, trainable, frozen, optimizer_state, guard)

    @functools.cached_property
    def step(self) -> JittedStep:
        """The step as it runs on devices; the state keeps its shardings."""
        stage = self.system.stage
        call = functools.partial(
            train_step,
            loss=self.loss,
            counts=getattr(objective(stage), "counts", None),
            optimizer=self.optimizer,
            policy=stage.divergence,
            seed=stage.seed,
        )
        return jax.jit(
            call,
            donate_argnums=0,
            out_shardings=(_shardings(self.abstract_state), None),
            compiler_options=stage.compiler.get(mesh.platform(self.system.device_mesh)) or None,
        )


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.sharding, state)
