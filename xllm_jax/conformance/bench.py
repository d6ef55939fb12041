"""A network with parameters and inputs, and its results: each program is compiled once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.conformance import subject as subjects
from xllm_jax.conformance.subject import Subject
from xllm_jax.core.types import Array, Params

Made = tuple[tuple[Array, Array], tuple[Params, Array]]


class Outcome(NamedTuple):
    """What one run of a network gives, as NumPy arrays.

    Attributes:
      states: its first result, `[rows, places, width]`.
      second: scores of an LLM, `[rows, places, vocabulary]`; else the lengths or counts, `[rows]`.
      parameters: gradients of the parameters.
      inputs: gradient of the first input.
    """

    states: np.ndarray
    second: np.ndarray
    parameters: Params
    inputs: np.ndarray


class Bench:
    """What the checks of all roles need.

    Attributes:
      subject: what is checked.
      network: its network in float32; `params`: its parameters.
      inputs: arrays of the program, rows first. The first one is differentiated, the last one holds
        the weight of each place in the loss, `[rows, places]`.
    """

    inputs: tuple[np.ndarray, ...]

    def __init__(self, subject: Subject):
        self.subject = subject
        self.network = subject.network()
        self.params = subjects.lively(self.network)

    def call(self, network: Any) -> Callable[..., tuple[Array, Array]]:
        """(params, *inputs without the weights) to the first two of `Outcome`."""
        raise NotImplementedError

    def valid(self, outcome: Outcome) -> np.ndarray:
        """Which places of which rows mean something, `[rows, places]` bool."""
        raise NotImplementedError

    def program(self, params: Params, *inputs: Array) -> Made:
        """((states, second), (gradients of the parameters, of the first input))."""
        call, (first, *others, weights) = self.call(self.network), inputs

        def loss(params: Params, first: Array) -> tuple[Array, tuple[Array, Array]]:
            states, second = call(params, first, *others)
            total = _mixed(states, weights)
            if jnp.issubdtype(second.dtype, jnp.floating):
                total = total + _mixed(second, weights)
            return total, (states, second)

        found = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, first)
        return found[0][1], found[1]

    @functools.cached_property
    def compiled(self) -> Callable[..., Made]:
        """The program as a jitted function."""
        return jax.jit(self.program)

    def run(self, params: Params, *inputs: Array | np.ndarray) -> Outcome:
        """Runs the program where its arguments lie."""
        (states, second), (parameters, first) = self.compiled(params, *inputs)
        parameters = jax.tree.map(np.asarray, parameters)
        return Outcome(np.asarray(states), np.asarray(second), parameters, np.asarray(first))

    @functools.cached_property
    def plain(self) -> Outcome:
        """The outcome on one device."""
        return self.run(self.params, *self.inputs)

    @functools.cached_property
    def coarse(self) -> Outcome:
        """The outcome in float32 of parameters that bfloat16 can hold."""
        return self.run(subjects.rounded(self.params, "float32"), *self.inputs)

    @functools.cached_property
    def half(self) -> tuple[np.ndarray, np.ndarray]:
        """States and second result with everything in bfloat16."""
        call = jax.jit(self.call(self.subject.network("bfloat16")))
        made = call(subjects.rounded(self.params), *self.inputs[:-1])
        if made[0].dtype != jnp.bfloat16:
            raise TypeError(f"the first result is {made[0].dtype} where the dtype is bfloat16")
        return np.asarray(made[0].astype(jnp.float32)), np.asarray(made[1])


def _mixed(x: Array, weights: Array) -> Array:
    """A sum in which every channel counts otherwise, so that none cancels another."""
    channels = jnp.cos(1.0 + jnp.arange(x.shape[-1], dtype=jnp.float32) ** 2)
    return (x.astype(jnp.float32) @ channels * weights).sum()
