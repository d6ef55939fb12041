"""Recorded output projections: values inside, output, distance to a caption, every gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources import nextgpt_projection
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core.types import Params
from xllm_jax.models.outputs.projection import TransformerProjection
from xllm_jax.objectives.align import distances

WEIGHTS = "w/fc.weight"


def projections(replay: Replay) -> None:
    """All cases, then the second version's zero queries, and a distance of 0."""
    for name in replay.names(f"*/{WEIGHTS}"):
        replay.attempt(_case, name.removesuffix(WEIGHTS))
    replay.attempt(_zero_queries)
    replay.attempt(_zero_distance)


def network(replay: Replay, case: str) -> tuple[TransformerProjection, Params]:
    """The recorded projection as ours, and its parameters."""
    weights = replay.weights(f"{case}w/")
    width, llm_width = weights["fc.weight"].shape
    net = TransformerProjection(
        llm_width=llm_width,
        queries=weights["query_embs"].shape[1],
        width=width,
        output_width=weights["model.weight"].shape[0],
        heads=_heads(replay),
    )
    shapes = jax.eval_shape(net.init, jax.random.key(0), *net.example())["params"]
    return net, import_tree(nextgpt_projection.rows(heads=net.heads), weights, shapes)[0]


def _heads(replay: Replay) -> int:
    return replay.about()["config"]["nhead"]


def _case(replay: Replay, case: str) -> None:
    net, params = network(replay, case)
    x, e, target = (replay.input(f"{case}{name}") for name in ("x", "e", "target"))

    def loss(params: Params, x: jax.Array, e: jax.Array) -> jax.Array:
        variables = {"params": params}
        capture = dict(capture_intermediates=True, mutable=["intermediates"])
        y, seen = net.apply(variables, x[:, None], e, **capture)
        far = distances(y, target)
        return far.mean(), (y, far, seen["intermediates"]["head_0"])

    compute = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (value, (y, far, seen)), gradients = compute(params, x, e)
    inner = {
        "fc": seen["inputs"]["__call__"][0],
        "encoder0": seen["encoder"]["__call__"][0][0][0],
        "memory": seen["encoder_norm"]["__call__"][0],
        "decoder0": seen["decoder"]["__call__"][0][0][0],
        "decoded": seen["decoder_norm"]["__call__"][0],
        "y": y,
        "distance": far,
        "loss": value,
        "grad_x": gradients[1],
        "grad_e": gradients[2],
    }
    for name, computed in inner.items():
        replay.compare(f"{case}{name}", computed)
    table = nextgpt_projection.rows(heads=net.heads)
    for name, gradient in export_tree(table, gradients[0]).items():
        replay.compare(f"{case}grad/{name}", gradient)


def _zero_queries(replay: Replay) -> None:
    if "rewrite/x" not in replay:
        return
    net, params = network(replay, "image/")
    net = net.clone(zero_queries=True)
    x, e = replay.input("rewrite/x"), replay.input("rewrite/e")
    drawn = net.init(jax.random.key(0), x[:, None], e)["params"]["head_0"]["queries"]
    params = params | {"head_0": params["head_0"] | {"queries": drawn}}
    replay.compare("rewrite/y", net.apply({"params": params}, x[:, None], e))


def _zero_distance(replay: Replay) -> None:
    if "zero_distance/u" not in replay:
        return
    u, v = replay.input("zero_distance/u"), replay.input("zero_distance/v")
    replay.compare("zero_distance/distance", distances(u, v))
    # The reference's gradient is NaN where the distance is 0, and ours is 0.
    gradient = jax.grad(lambda u: distances(u, jnp.asarray(v)).mean())(u)
    name = "quirk_zero_distance/grad_u"
    same = (u == v).all(-1, keepdims=True)
    replay.compare(name, gradient, np.where(same, 0, replay.recorded(name)))
