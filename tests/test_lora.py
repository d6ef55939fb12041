"""Adapters beside kernels: the merged product by hand, and what does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.models import lora


def drawn(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def tree(name, **leaves):
    return {"layers": {name: leaves}}


def test_merged_kernels_of_stacked_layers():
    """Of heads behind a kernel (queries) and before it (the output), each layer for itself."""
    params = {
        "layers": {"query": {"kernel": drawn(3, 8, 2, 4)}, "out": {"kernel": drawn(3, 2, 4, 8)}}
    }
    adapters = {
        "layers": {
            "query": {"lora_a": drawn(3, 8, 5), "lora_b": drawn(3, 5, 2, 4)},
            "out": {"lora_a": drawn(3, 2, 4, 5), "lora_b": drawn(3, 5, 8)},
        }
    }
    merged = lora.merge(params, adapters, 0.5)["layers"]
    low = adapters["layers"]
    for layer in range(3):
        wanted = np.einsum(
            "dr,rhk->dhk", low["query"]["lora_a"][layer], low["query"]["lora_b"][layer]
        )
        kernel = params["layers"]["query"]["kernel"][layer]
        np.testing.assert_allclose(
            merged["query"]["kernel"][layer], kernel + 0.5 * wanted, 1e-4, 1e-5
        )
        wanted = np.einsum("hkr,rd->hkd", low["out"]["lora_a"][layer], low["out"]["lora_b"][layer])
        kernel = params["layers"]["out"]["kernel"][layer]
        np.testing.assert_allclose(
            merged["out"]["kernel"][layer], kernel + 0.5 * wanted, 1e-4, 1e-5
        )


@pytest.mark.parametrize(
    "name, a, b",
    [
        ("query", (3, 9, 5), (3, 5, 2, 4)),  # another width
        ("query", (3, 8, 5), (3, 6, 2, 4)),  # another rank
        ("query", (2, 8, 5), (2, 5, 2, 4)),  # another depth
        ("key", (3, 8, 5), (3, 5, 2, 4)),  # no such kernel
    ],
)
def test_adapters_of_another_base_are_refused(name, a, b):
    params = tree("query", kernel=drawn(3, 8, 2, 4))
    with pytest.raises(UserError, match=rf"layers/{name}/lora_a"):
        lora.merge(params, tree(name, lora_a=drawn(*a), lora_b=drawn(*b)), 1.0)
