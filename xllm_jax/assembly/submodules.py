"""The modules inside a network, one by one."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn


def submodules(network: Any) -> dict[str, nn.Module]:
    """{path: module, with the fields that the network gives it} of all that a network calls."""
    found: dict[str, nn.Module] = {}

    def remember(call: Any, arguments: Any, options: Any, context: Any) -> Any:
        module = context.module
        if module.scope is not None:
            found["/".join(module.path)] = module.clone(parent=None, name=None)
        return call(*arguments, **options)

    with nn.intercept_methods(remember):
        jax.eval_shape(network.init, jax.random.key(0), *network.example())
    return found
