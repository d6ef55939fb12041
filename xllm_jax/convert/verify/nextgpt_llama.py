"""Recorded causal decoders: whole sequences, paddings, positions, gradients, cached decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree, import_tree, sizes
from xllm_jax.convert.published_config import PublishedConfig
from xllm_jax.convert.sources import llama, llama_config
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core import rules
from xllm_jax.core.types import Params
from xllm_jax.models.causal import Causal

WEIGHTS = "w/model.norm.weight"
IGNORED = -100  # a label that does not count


def models(replay: Replay) -> None:
    """All models of the file."""
    configs = replay.about()["config"]["models"]
    for name in replay.names(f"*/{WEIGHTS}"):
        model = name.removesuffix(WEIGHTS)
        replay.attempt(_model, model, configs[model.strip("/")])


def network(config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> tuple[Causal, Params]:
    """A recorded LLM as ours, and its parameters.

    Args:
      config: fields of its config.json.
      weights: {name of Hugging Face: array}.
    """
    values = llama_config.DEFAULTS | {"model_type": "llama"} | dict(config)
    found = llama_config.fields(PublishedConfig(values, "config.", frozenset(config)))
    model = llama.network(found)
    return model, import_tree(llama.rows(model), weights, sizes.shapes_of(model), drop=llama.DROP)[
        0
    ]


def layout(mask: np.ndarray, positions: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
    """Segments, context and positions `[B, T]` of rows that are masked as the reference does it.

    Args:
      mask: `[B, T]`, 0 = nobody sees the token, which goes on reading those before it.
      positions: `[B, T]`; 0, 1, 2 … when None.
    """
    segments = np.where(mask > 0, 1, -1).astype(np.int32)
    if positions is None:
        positions = np.broadcast_to(np.arange(mask.shape[1], dtype=np.int32), mask.shape)
    return segments, np.zeros(mask.shape, bool), positions[..., None]


def shifted_loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    """Mean cross-entropy of the labels that count, each predicted by the position before it."""
    ahead, wanted = logits[:, :-1], labels[:, 1:]
    counts = wanted != IGNORED
    scores = jax.nn.log_softmax(ahead.astype(jnp.float32))
    picked = jnp.take_along_axis(scores, np.where(counts, wanted, 0)[..., None], axis=-1)[..., 0]
    return -(picked * counts).sum() / counts.sum()


def _model(replay: Replay, name: str, config: Mapping[str, Any]) -> None:
    model, params = network(config, replay.weights(f"{name}w/"))
    replay.compare(f"{name}inv_freq", np.asarray(model.rotation.frequencies, np.float32))
    for case in replay.names(f"{name}*/input_ids"):
        case = case.removesuffix("input_ids")
        replay.attempt(_decode if f"{case}tokens" in replay else _case, case, model, params)
    for case in replay.names(f"{name}*_all_labels/labels"):
        replay.attempt(_gradients, case.removesuffix("labels"), model, params)


def _inputs(replay: Replay, case: str) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]:
    """Ids, attention mask and layout of a case."""
    ids, mask = replay.input(f"{case}input_ids"), replay.input(f"{case}attention_mask")
    given = f"{case}position_ids"
    return ids, mask, layout(mask, replay.input(given) if given in replay else None)


def _case(replay: Replay, case: str, model: Causal, params: Params) -> None:
    """Hidden states, logits, loss and its gradient to the embeddings."""
    ids, mask, rows = _inputs(replay, case)
    labels = replay.input(f"{case}labels")

    def loss(x: jax.Array, params: Params) -> Any:
        variables = {"params": params}
        extra = dict(capture_intermediates=True, mutable=["intermediates"])
        (states, _), seen = model.apply(variables, x, *rows, **extra)
        logits = model.apply(variables, states, method="logits")
        return shifted_loss(logits, labels), (states, logits, seen["intermediates"]["layers"])

    x = model.apply({"params": params}, ids, method="embed")
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (states, logits, seen)), gradient = run(x, params)
    inside = {path: leaf[0] for path, leaf in rules.flatten(seen).items() if "/" in path}
    blocks = [x, *seen["__call__"][0][0][0][:-1], states]
    names = {"norm": "attention_norm", "attn": "attention/out", "mlp": "feed_forward"}
    found = {f"hidden{n}": block for n, block in enumerate(blocks)} | {
        f"layer{n}_{theirs}": inside[f"{ours}/__call__"][n]
        for n in range(model.depth)
        for theirs, ours in names.items()
    }
    left = not mask[:, 0].all()  # rows of padding on the left are recorded as zeros
    for array, computed in (found | {"logits": logits}).items():
        replay.compare(f"{case}{array}", computed * mask[..., None] if left else computed)
    replay.compare(f"{case}loss", value)
    replay.compare(f"{case}grad_inputs_embeds", gradient)


def _gradients(replay: Replay, case: str, model: Causal, params: Params) -> None:
    """The gradient of every parameter, for other labels of a case."""
    ids, _, rows = _inputs(replay, case.replace("_all_labels", ""))
    labels = replay.input(f"{case}labels")

    def loss(params: Params) -> jax.Array:
        variables = {"params": params}
        x = model.apply(variables, ids, method="embed")
        states, _ = model.apply(variables, x, *rows)
        return shifted_loss(model.apply(variables, states, method="logits"), labels)

    for name, gradient in export_tree(llama.rows(model), jax.jit(jax.grad(loss))(params)).items():
        replay.compare(f"{case}grad/{name}", gradient)


def _decode(replay: Replay, case: str, model: Causal, params: Params) -> None:
    """Greedy decoding with a cache behind a prompt that is padded on the left."""
    ids, mask = replay.input(f"{case}input_ids"), replay.input(f"{case}attention_mask")
    steps, variables = replay.recorded(f"{case}tokens").shape[1], {"params": params}

    @jax.jit
    def feed(ids: jax.Array, rows: tuple, cache: Any) -> tuple[jax.Array, jax.Array, Any]:
        x = model.apply(variables, ids, method="embed")
        states, cache = model.apply(variables, x, *rows, cache)
        return states, model.apply(variables, states[:, -1], method="logits"), cache

    after = mask.sum(1)[:, None]
    first = layout(mask, np.maximum(mask.cumsum(1) - 1, 0) * mask)
    cache = model.init_cache(len(ids), ids.shape[1] + steps)
    _, scores, cache = feed(ids, first, cache)
    logits, tokens, last = [scores], [], []
    for step in range(steps):
        tokens.append(scores.argmax(-1)[:, None])
        rows = layout(np.ones_like(after), after + step)
        states, scores, cache = feed(tokens[-1], rows, cache)
        logits.append(scores)
        last.append(states[:, -1])
    found = {"tokens": np.concatenate(tokens, 1)}
    found |= {"logits": np.stack(logits, 1), "last_hidden": np.stack(last, 1)}
    for array, computed in found.items():
        replay.compare(f"{case}{array}", computed)
    for letter, name in (("k", "key"), ("v", "value")):
        for layer in range(model.depth):
            part = np.asarray(cache[name][layer]).transpose(0, 2, 1, 3)
            replay.compare(f"{case}cache_{letter}{layer}", part)
