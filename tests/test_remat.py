"""What layers compute again is work: less of it for 'products' than for 'all', none for 'none'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from xllm_jax.assembly import networks
from xllm_jax.configs import stage2_image
from xllm_jax.core import flops, lookup
from xllm_jax.core.errors import UserError

NETWORKS = {  # name: fields besides those of the miniature
    "speech_interface.SpeechInterface": {},
    "conformer.SpeechEncoder": {"depth": 2, "pools": (1,)},
    "interfaces.QFormerInterface": {},
    "vit.VisionTransformer": {},
}


def done(name: str, remat: str, train: bool) -> float:
    """FLOPs of one network's forward pass, with its gradient where it trains."""
    file, kind = lookup.attribute("xllm_jax.models", name)
    network = kind(**{**file.SIZES["tiny"], **NETWORKS[name], "remat": remat})
    params = jax.eval_shape(lambda: networks.init_params(network, jax.random.key(0)))

    def total(params):
        found = network.apply({"params": params}, *network.example())
        return sum(x.sum() for x in jax.tree.leaves(found) if x.dtype == jnp.float32)

    return flops.measured(jax.grad(total) if train else total, params)


@pytest.mark.parametrize("name", NETWORKS)
def test_products_lies_between_none_and_all(name):
    forward = done(name, "none", train=False)
    none, products, every = (done(name, remat, train=True) for remat in ("none", "products", "all"))
    assert none < products < every
    assert every <= none + forward  # each layer runs once more, and no more than that


def test_a_typo_is_told_the_choices():
    stage = stage2_image.get_config("tiny")
    stage.remat = "dots"
    with pytest.raises(UserError, match=r"remat.*'dots'.*none, products, all"):
        networks.model(stage)
