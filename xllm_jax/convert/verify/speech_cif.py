"""Recorded integrate-and-fire: the bare function in many cases, and the module around it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources.cif_asr import cif_rows
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.models import cif


def cases(replay: Replay) -> None:
    """The function alone: embeddings, gradients, quantities, masks."""
    rows = max((replay.recorded(name).shape[0] for name in replay.names("*/alpha")), default=0)
    compiled = jax.jit(_fire, static_argnums=(5, 6))
    for case, about in replay.about().items():
        replay.attempt(_case, case, about, functools.partial(_padded, compiled, rows))


def _fire(frames, alpha, lengths, counts, weights, capacity: int, firing: cif.Firing):
    """What fires, and the gradients of sum(embeddings * weights)."""

    def total(frames, alpha):
        fired = cif.integrate_and_fire(frames, alpha, lengths, capacity, counts, firing)
        return (fired.embeddings * weights).sum(), fired

    gradients, fired = jax.grad(total, (0, 1), has_aux=True)(frames, alpha)
    return fired, gradients


def _padded(
    compiled: Callable, rows: int, frames, alpha, lengths, counts, weights, firing: cif.Firing
):
    """Runs `_fire` with empty rows and room for more tokens, so that cases share compiled code."""
    batch, steps = alpha.shape
    capacity = max(steps + 1, weights.shape[1])  # a token a frame, and the tail

    def fill(x: np.ndarray, *sizes: int) -> np.ndarray:
        return np.pad(x, [(0, size - length) for size, length in zip(sizes, x.shape)])

    fired = compiled(
        fill(frames, rows, *frames.shape[1:]),
        fill(alpha, rows, steps),
        fill(lengths, rows),
        None if counts is None else fill(counts, rows),
        fill(weights, rows, capacity, weights.shape[2]),
        capacity,
        firing,
    )
    return jax.tree.map(lambda x: x[:batch], fired)


def _case(replay: Replay, case: str, about: Mapping[str, Any], fire: Callable) -> None:
    def get(name: str) -> np.ndarray:
        return replay.input(f"{case}/{name}")

    padded = get("pad_mask")
    lengths = (~padded).sum(-1)
    counts = get("target_len") if about["training"] else None
    tokens, capacity = replay.recorded(f"{case}/out").shape[1], get("R").shape[1]
    most = int(get("target_len").max(initial=0)) if about["training"] else 0
    firing = cif.Firing(
        about["theta"],
        about["tail_threshold"],
        about["tail_handling"],
        closing_frame=False,
        accidents=about["quirk"],
    )
    weights = np.where(np.arange(capacity)[None, :, None] < tokens, get("R"), 0)
    weights = np.pad(weights, ((0, 0), (0, max(0, most - capacity)), (0, 0)))
    fired, gradients = fire(get("h"), get("alpha"), lengths, counts, weights, firing)
    tokens = shown(fired, tokens)
    replay.compare(f"{case}/out", fired.embeddings[:, :tokens])
    replay.compare(f"{case}/d_h", gradients[0])
    replay.compare(f"{case}/d_alpha", gradients[1])
    replay.compare(f"{case}/quantity", fired.quantity)
    alpha = cif.mask_weights(get("alpha"), lengths)
    alpha = alpha if counts is None else cif.scale_weights(alpha, counts)
    replay.compare(f"{case}/alpha_scaled", alpha)
    found = np.asarray(fired.counts)
    mask = np.arange(tokens) < found[:, None]
    first = np.arange(tokens) == 0  # one reference marks the first place of an empty row
    replay.compare(f"{case}/out_mask", mask | first if about["by"] == "CIF-HieraDist" else mask)
    replay.compare(f"{case}/hd_out_mask", mask | first)
    replay.compare(f"{case}/hd_durations", durations(np.asarray(fired.frames)[:, :tokens], found))


def shown(fired: cif.Fired, tokens: int) -> int:
    """How many tokens are compared: what is recorded, or more where more fired, which is a miss."""
    return max(tokens, int(np.asarray(fired.counts).max(initial=0)))


def durations(frames: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Frames between one fired token and the next, the first counted from frame 0."""
    exists = np.arange(frames.shape[1]) < counts[:, None]
    return np.where(exists, np.diff(frames, prepend=0, axis=1), 0)


def module(replay: Replay) -> None:
    """The module in its variants, in evaluation and in training with gradients."""
    for variant, about in replay.about().items():
        replay.attempt(_variant, variant, about["cfg"])


def _variant(replay: Replay, variant: str, settings: Mapping[str, Any]) -> None:
    frames, lengths = replay.input("h"), (~replay.input("pad_mask")).sum(-1)
    projected = settings["cif_embedding_dim"] != settings["encoder_embed_dim"]
    kernel = settings["conv_cif_width"] if settings["produce_weight_type"] == "conv" else 0
    table = cif_rows("", "", kernel, projected)
    network = cif.CIF(
        max_tokens=frames.shape[1] + 1,  # a token a frame, and the tail
        kernel=kernel,
        output_width=settings["cif_embedding_dim"] if projected else None,
        threshold=settings["cif_threshold"],
        tail_threshold=settings["tail_handling_firing_threshold"],
        tail=settings["apply_tail_handling"],
        closing_frame=False,
        mask_padding=False,
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), frames, lengths)["params"]
    names = [name for row in table for name in row.names() if f"{variant}/{name}" in replay]
    source = {name: replay.input(f"{variant}/{name}") for name in names}
    params, _ = import_tree(table, source, shapes)
    apply = functools.partial(network.apply, capture_intermediates=True, mutable=["intermediates"])
    fired, seen = jax.jit(apply)({"params": params}, frames, lengths)
    scores = seen["intermediates"]["weight"]["__call__"][0][..., 0]
    replay.compare(f"{variant}/alpha", jax.nn.sigmoid(scores))
    _fired(replay, f"{variant}/eval", fired)
    _trained(replay, variant, network, params, frames, lengths, table)


def _fired(replay: Replay, prefix: str, fired: cif.Fired) -> None:
    tokens = shown(fired, replay.recorded(f"{prefix}_out").shape[1])
    replay.compare(f"{prefix}_out", fired.embeddings[:, :tokens])
    replay.compare(f"{prefix}_mask", np.arange(tokens) < np.asarray(fired.counts)[:, None])
    replay.compare(f"{prefix}_quantity", fired.quantity)


def _trained(replay: Replay, variant: str, network, params, frames, lengths, table) -> None:
    weights, counts = replay.input(f"{variant}/train_R"), replay.input("target_len")
    capacity = max(network.max_tokens, weights.shape[1], int(counts.max(initial=0)))
    weights = np.pad(weights, ((0, 0), (0, capacity - weights.shape[1]), (0, 0)))
    network = network.clone(max_tokens=capacity)

    def total(params, frames):
        fired = network.apply({"params": params}, frames, lengths, counts, train=True)
        distance = jnp.abs(fired.quantity - counts).sum()  # the recorded loss has this term
        return (fired.embeddings * weights).sum() + 0.3 * distance, fired

    gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (to_params, to_frames), fired = gradients(params, frames)
    _fired(replay, f"{variant}/train", fired)
    replay.compare(f"{variant}/train_d_h", to_frames)
    for name, gradient in export_tree(table, to_params).items():
        replay.compare(f"{variant}/train_grad/{name}", gradient)
