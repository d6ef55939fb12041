"""The recorded vision encoder: every block, other image sizes, and the epsilons of its norms."""

from __future__ import annotations

import jax

from xllm_jax.convert.files import open_checkpoint
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.vision_model import STAGE1, Reference, images
from xllm_jax.models import layers, vit

INSIDE = {
    "norm1": ("attention_norm",),
    "attn": ("attention",),
    "norm2": ("feed_forward_norm",),
    "mlp_fc1": ("feed_forward", "up"),
    "mlp": ("feed_forward",),
}


def values(replay: Replay, reference: Reference) -> None:
    """Hidden states, resized position tables, norms."""
    replay.attempt(_hidden_states, reference)
    for way in ("up", "down"):
        if f"interp_{way}_pixels" in replay:
            replay.attempt(_other_size, reference, way)
    replay.attempt(_norms, reference)


def _hidden_states(replay: Replay, reference: Reference) -> None:
    model, params = reference.vision
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, capture_intermediates=True))
    (features, _), state = run(params, images(replay.input("pixels")))
    state = state["intermediates"]
    replay.compare("output", features)
    replay.compare("patch_embed", state["embeddings"]["patches"]["__call__"][0])
    replay.compare("embeddings", state["embeddings"]["__call__"][0])
    block = state["layers"]
    for number in range(model.depth):
        replay.compare(f"block_{number:02d}", block["__call__"][0][0][number])
        for name, path in INSIDE.items():
            value = block
            for part in path:
                value = value[part]
            replay.compare(f"block_{number:02d}_{name}", value["__call__"][0][number])
        up = block["feed_forward"]["up"]["__call__"][0][number]
        replay.compare(f"block_{number:02d}_mlp_gelu", layers.gelu_exact(up))


def _other_size(replay: Replay, reference: Reference, way: str) -> None:
    model, params = reference.vision
    pixels = replay.input(f"interp_{way}_pixels")
    grid = tuple(side // model.patch for side in pixels.shape[2:])
    table = vit.resize_positions(params["embeddings"]["positions"], grid)
    replay.compare(f"interp_{way}_pos_embed", table[None])
    replay.compare(f"interp_{way}_output", reference.encode(pixels)[0])


def _norms(replay: Replay, reference: Reference) -> None:
    """The three epsilons, on vectors so small that they show."""
    narrow = open_checkpoint(reference.weights / STAGE1)
    config, (_, params) = reference.config, reference.vision
    block = jax.tree.map(lambda leaf: leaf[0], params["layers"]["attention_norm"])
    outer, query = (
        {"scale": narrow[f"{name}.weight"], "bias": narrow[f"{name}.bias"]}
        for name in ("ln_vision", "Qformer.bert.embeddings.LayerNorm")
    )
    for source, name, epsilon, norm in (
        ("vit", "block_00_norm1", config["vit"]["norm_eps"], block),
        ("vit", "ln_vision", config["ln_vision_eps"], outer),
        ("qformer", "qformer_embeddings_LayerNorm", config["qformer"]["layer_norm_eps"], query),
    ):
        if f"eps_in_{source}" in replay:
            x = replay.input(f"eps_in_{source}")
            y = layers.LayerNorm(epsilon).apply({"params": norm}, x)
            replay.compare(f"eps_out_{name}", y)
    if "ln_vision" in replay:
        wide = layers.LayerNorm(config["ln_vision_eps"])
        replay.compare("ln_vision", wide.apply({"params": outer}, replay.recorded("output")))
