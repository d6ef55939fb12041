"""What a row of `cpu.py` is, and how one network becomes a row."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from xllm_jax.core import rules

Call = Callable[..., Any]
Compared = Iterator[tuple[str, Any, Any]]


@dataclasses.dataclass(frozen=True)
class Pair:
    """One piece of work on both sides.

    Attributes:
      sizes: of the work, for the table.
      ours: does it once, waits, and returns what it gives.
      theirs: (what wraps the network, such as torch.compile) to the same for PyTorch.
      compared: (a result of ours, of theirs) to (name, our array, their array).
    """

    sizes: str
    ours: Callable[[], Any]
    theirs: Callable[[Call], Callable[[], Any]]
    compared: Callable[[Any, Any], Compared]


@dataclasses.dataclass(frozen=True)
class Work:
    """A network from one input to one output, on both sides.

    Attributes:
      run: (our parameters, the input) to the output.
      params, x: parameters and input.
      call: the input to the output in PyTorch.
      module: whose parameters `call` uses.
      given: its input.
      fill: puts our parameters, `{path: leaf}`, into the module.
    """

    run: Call
    params: Any
    x: Any
    call: Call
    module: Any
    given: torch.Tensor
    fill: Callable[[Any, dict[str, torch.Tensor]], None]

    def forward(self, sizes: str) -> Pair:
        """The output alone, without a graph for gradients."""
        self.fill(self.module.train(), tensors(self.params))
        run = jax.jit(self.run)

        def theirs(wrap: Call) -> Callable[[], Any]:
            return torch.inference_mode()(functools.partial(wrap(self.call), self.given))

        def compared(ours: Any, other: torch.Tensor) -> Compared:
            yield "output", ours, other

        ours = lambda: jax.block_until_ready(run(self.params, self.x))  # noqa: E731
        return Pair(sizes, ours, theirs, compared)

    def backward(self, sizes: str) -> Pair:
        """The output, and gradients of a random sum of it in all parameters."""
        self.fill(self.module.train(), tensors(self.params))
        weights = drawn(1, jax.eval_shape(self.run, self.params, self.x).shape)
        their_weights = torch.from_numpy(np.array(weights))

        def loss(params: Any, x: Any) -> tuple[Any, Any]:
            made = self.run(params, x)
            return (made * weights).sum(), made

        step = jax.jit(jax.grad(loss, has_aux=True))
        ours = lambda: jax.block_until_ready(step(self.params, self.x))  # noqa: E731

        def theirs(wrap: Call) -> Callable[[], Any]:
            call = wrap(self.call)

            def advance() -> torch.Tensor:
                self.module.zero_grad(set_to_none=True)
                made = call(self.given)
                (made * their_weights).sum().backward()
                return made.detach()

            return advance

        return Pair(sizes, ours, theirs, self._gradients)

    def _gradients(self, ours: Any, theirs: torch.Tensor) -> Compared:
        """Output and every gradient, ours under the names of PyTorch."""
        gradients, made = ours
        yield "output", made, theirs
        named = copy.deepcopy(self.module)
        self.fill(named, tensors(gradients))
        for (name, expected), other in zip(named.named_parameters(), self.module.parameters()):
            if other.grad is not None:
                yield f"gradient of {name}", expected.detach(), other.grad


def drawn(seed: int, shape: tuple[int, ...]) -> Any:
    """Normal numbers, float32."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params_of(network: Any, *inputs: Any, spread: float = 0.0) -> Any:
    """Its parameters with no bias 0 and no scale 1; matrices of another `spread` if given."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    made = jax.jit(network.init)(jax.random.key(0), *inputs)["params"] if not spread else shapes
    flat, rng = {}, np.random.default_rng(4)
    for path, leaf in rules.flatten(made).items():
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        flat[path] = spread * noise if spread else np.asarray(leaf) + 0.02 * noise
        if spread and path.endswith("scale"):
            flat[path] = 1 + flat[path]
    return jax.tree.map(jnp.asarray, rules.unflatten(flat))


def tensors(params: Any) -> dict[str, torch.Tensor]:
    """{path: leaf} for PyTorch."""
    return {path: torch.from_numpy(np.array(x)) for path, x in rules.flatten(params).items()}


def stack_of(sizes: dict[str, Any]) -> str:
    """Sizes of a stack, for the table."""
    return f"width {sizes['width']}, depth {sizes['depth']}, {sizes['heads']} heads"
