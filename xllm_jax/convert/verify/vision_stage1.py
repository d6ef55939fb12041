"""Recorded losses of BLIP-2's first stage: values, gradients, and two ranks as one batch."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.vision_model import Reference, contrast_table, norms
from xllm_jax.convert.verify.vision_qformer import smoothing_of
from xllm_jax.models import layers
from xllm_jax.objectives import blip2_pretraining

RULES = ("xllm", "lavis")  # how negatives are drawn; each has its own recorded run
LOSSES = (("itc", "itc"), ("itm", "itm"), ("lm", "itg"))  # recorded and our names


def inputs(source: Replay, reference: Reference) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """(features, ids, mask) of the recorded pairs."""
    features = reference.encode(source.input("pixels"))[0]
    return features, source.input("text_input_ids"), source.input("text_attention_mask") > 0


def negatives_of(source: Replay, prefix: str) -> list[np.ndarray]:
    """Images and texts that a recorded run drew as negatives."""
    return [source.input(f"{prefix}_neg_{side}_idx") for side in ("image", "text")]


def _everything(reference: Reference, features, ids, mask, negatives) -> dict[str, Any]:
    """Every intermediate value of the three losses, in one compiled call."""
    model, params = reference.contrast

    @jax.jit
    def run(params, features, ids, mask, start_ids, negatives):
        variables = {"params": params}
        image = model.apply(variables, features, method="normalize")
        states, units, cache = model.apply(variables, image, method="image")
        text, text_units = model.apply(variables, ids, mask, method="text")
        similar = blip2_pretraining.similarities(units, text_units[:, 0], params["temperature"])
        rows = blip2_pretraining.matching_rows(image, ids, mask, *negatives)
        matched, per_query = model.apply(variables, *rows, method="match")
        captioned, logits = model.apply(variables, start_ids, mask, cache, method="caption")
        return {
            "image": image,
            "states": states,
            "text": text,
            "similar": similar,
            "rows": rows,
            "matched": matched,
            "per_query": per_query,
            "captioned": captioned,
            "logits": logits,
        }

    start_ids = ids.copy()
    start_ids[:, 0] = reference.start
    return run(params, features, ids, mask, start_ids, negatives)


def values(replay: Replay, reference: Reference) -> None:
    """Both references' runs: every value and every loss."""
    replay.compare("temp", reference.contrast[1]["temperature"])
    for rule in RULES:
        if replay.names(f"{rule}_*"):
            replay.attempt(_values, reference, rule)


def _values(replay: Replay, reference: Reference, rule: str) -> None:
    model, params = reference.contrast
    features, ids, mask = inputs(replay, reference)
    negatives = negatives_of(replay, rule)
    found = _everything(reference, features, ids, mask, negatives)
    replay.compare(f"{rule}_image_embeds", found["image"])
    replay.compare(f"{rule}_query_last_hidden_state", found["states"])
    replay.compare(f"{rule}_text_last_hidden_state", found["text"])
    dense = layers.Dense(model.embed)
    for name, part, value in (
        ("vision", "image_projection", found["states"]),
        ("text", "text_projection", found["text"][:, 0]),
    ):
        replay.compare(f"{rule}_{name}_proj", dense.apply({"params": params[part]}, value))
    for name, value in zip(("i2t", "t2i"), found["similar"]):
        replay.compare(f"{rule}_sim_{name}", value)
        replay.compare(f"{rule}_weights_{name}", blip2_pretraining.negative_weights(value, rule))
    replay.compare(f"{rule}_itc_targets", np.arange(len(ids)))
    _matching(replay, rule, model.queries, found)
    replay.compare(f"{rule}_itg_last_hidden_state", found["captioned"])
    replay.compare(f"{rule}_itg_logits", found["logits"])
    start_ids = ids.copy()
    start_ids[:, 0] = reference.start
    labels = np.where(mask, start_ids, -100)[:, 1:].reshape(-1)
    replay.compare(f"{rule}_itg_labels_shifted", labels)
    run = jax.jit(functools.partial(blip2_pretraining.pair_loss, model))
    total, metrics = run(params, features, ids, mask, start=reference.start, negatives=negatives)
    replay.compare(f"{rule}_loss", total)
    for theirs, ours in LOSSES:
        replay.compare(f"{rule}_loss_{theirs}", metrics[ours])


def _matching(replay: Replay, rule: str, queries: int, found: dict[str, Any]) -> None:
    rows, per_query = found["rows"], found["per_query"]
    mask = np.pad(rows[2], ((0, 0), (queries, 0)), constant_values=True)
    replay.compare(f"{rule}_itm_input_ids", rows[1])
    replay.compare(f"{rule}_itm_attention_mask", mask)
    replay.compare(f"{rule}_itm_last_hidden_state", found["matched"])
    replay.compare(f"{rule}_itm_head", per_query)
    replay.compare(f"{rule}_itm_logits", per_query.mean(1))
    count = per_query.shape[0]  # the pairs themselves, then two kinds of negatives
    replay.compare(f"{rule}_itm_labels", np.arange(count) < count // 3)


def gradients(replay: Replay, reference: Reference) -> None:
    """Gradients of every loss, with the pairs and negatives that the values record."""
    source = reference.other("cases_stage1.npz")
    model, params = reference.contrast
    order = reference.info["stage1"]["parameter_order_of_grad_norm"]
    features, ids, mask = inputs(source, reference)
    table = contrast_table(model)

    @functools.partial(jax.jit, static_argnames=("detach",))
    def compute(params, negatives, detach=True):
        def terms(params):
            options = dict(start=reference.start, negatives=negatives, detach=detach)
            total, metrics = blip2_pretraining.pair_loss(
                model, params, features, ids, mask, **options
            )
            return jnp.stack([total, *(metrics[ours] for _, ours in LOSSES)])

        return jax.jacrev(terms)(params)

    def named(rule: str, number: int, **options: Any) -> dict[str, np.ndarray]:
        rows = compute(params, negatives_of(source, rule), **options)
        return export_tree(table, jax.tree.map(lambda leaf: np.asarray(leaf)[number], rows))

    for rule in RULES:
        if not replay.names(f"{rule}_grad_norm*"):
            continue
        whole = named(rule, 0)
        replay.compare(f"{rule}_grad_norm", norms(whole, order))
        replay.compare(f"{rule}_grad_norm_global", np.linalg.norm(norms(whole, order)))
        for number, (theirs, _) in enumerate(LOSSES, start=1):
            found = norms(named(rule, number), order)
            replay.compare(f"{rule}_grad_norm_loss_{theirs}", found)
        if rule == RULES[0]:
            for name in order:
                replay.compare(f"grad.{name}", whole[name])
    if "fullgather_grad_norm" in replay:
        found = norms(named(RULES[0], 0, detach=False), order)
        replay.compare("fullgather_grad_norm", found)


def ranks(replay: Replay, reference: Reference) -> None:
    """Two ranks of the reference, which are halves of one batch of ours."""
    model, params = reference.contrast

    def both(name: str) -> np.ndarray:
        return np.concatenate([replay.input(f"rank{rank}_{name}") for rank in (0, 1)])

    ids, mask = both("text_input_ids"), both("text_attention_mask") > 0
    negatives = [both(f"neg_{side}_idx") for side in ("image", "text")]
    features = reference.encode(replay.input("pixels"))[0]
    found = _everything(reference, features, ids, mask, negatives)
    smoothing = smoothing_of(reference)
    for rank in (0, 1):
        replay.attempt(_rank, rank, found, ids, mask, smoothing)

    @jax.jit
    def loss(params):
        options = dict(start=reference.start, negatives=negatives, shards=2)
        return blip2_pretraining.pair_loss(model, params, features, ids, mask, **options)

    gradient, metrics = jax.grad(loss, has_aux=True)(params)
    for theirs, ours in LOSSES:
        ranks = [replay.recorded(name) for name in replay.names(f"rank?_loss_{theirs}")]
        if ranks:
            error = float(abs(metrics[ours] - np.mean(ranks)))
            replay.check(f"rank0_loss_{theirs}", error, 1e-4, "mean over the ranks")
    tensors = export_tree(contrast_table(model), gradient)
    order = reference.info["world2"]["parameter_order_of_ddp_grad_norm"]
    replay.compare("ddp_grad_norm", norms(tensors, order))
    for name in replay.names("ddp_grad.*"):
        replay.compare(name, tensors[name.removeprefix("ddp_grad.")])


def _rank(replay: Replay, rank: int, found: dict, ids, mask, smoothing: float) -> None:
    """A rank's own similarities and losses, from the rows that it owns."""
    size = len(ids) // 2
    own = slice(rank * size, (rank + 1) * size)
    targets = np.arange(own.start, own.stop)
    replay.compare(f"rank{rank}_itc_targets", targets)
    itc = 0.0
    for name, value in zip(("i2t", "t2i"), found["similar"]):
        replay.compare(f"rank{rank}_sim_{name}", value[own])
        weights = blip2_pretraining.negative_weights(value, RULES[0])
        replay.compare(f"rank{rank}_weights_{name}", weights[own])
        itc += blip2_pretraining.smoothed_cross_entropy(value[own], targets, smoothing).mean() / 2
    logits = found["per_query"].mean(1)
    logits = np.concatenate([logits[part * 2 * size :][own] for part in range(3)])
    replay.compare(f"rank{rank}_itm_logits", logits)
    itm, _ = blip2_pretraining.matching(logits[:, None], np.ones(size))
    itg, _ = blip2_pretraining.captioning(found["logits"][own], ids[own], mask[own], smoothing)
    for name, value in (("_itc", itc), ("_itm", itm), ("_lm", itg), ("", itc + itm + itg)):
        replay.compare(f"rank{rank}_loss{name}", value)
