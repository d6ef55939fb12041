"""The modules inside a network, one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
from flax import linen as nn
from flax.linen.module import InterceptorContext

T = TypeVar("T")


def submodules(network: nn.Module) -> dict[str, nn.Module]:
    """{path: module, with the fields that the network gives it} of all that a network calls."""
    found: dict[str, nn.Module] = {}

    def remember(
        call: Callable[..., T],
        arguments: tuple[object, ...],
        options: Mapping[str, object],
        context: InterceptorContext,
    ) -> T:
        module = context.module
        if module.scope is not None:
            found["/".join(module.path)] = module.clone(parent=None, name=None)
        return call(*arguments, **options)

    with nn.intercept_methods(remember):
        jax.eval_shape(network.init, jax.random.key(0), *network.example())
    return found
