"""Recordings of ChatGLM-6B: `weights/` in the published form and `cases_*.npz` beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree
from xllm_jax.convert.sources import chatglm
from xllm_jax.convert.verify import chatglm_decode, chatglm_media
from xllm_jax.convert.verify.chatglm_model import Reference, forward, layout_of, read_llm
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.tolerances import Stated
from xllm_jax.core import rules
from xllm_jax.core.types import Params
from xllm_jax.data.text import glm_layout, token_rows
from xllm_jax.models import decoder_cache, glm, layers
from xllm_jax.objectives.answer import answer_loss

# Where the README states what; the first fitting row counts.
TOLERANCES = (
    Stated("*", "last_logits_f16math", "float16 arithmetic"),
    Stated("rotary.npz", "*_f16", "rotary tables", 1),
    Stated("rotary.npz", "*", "rotary tables"),
    Stated("*", "*.loss", "loss, nll"),
    Stated("*", "*.nll", "loss, nll", 1),
    Stated("*", "*.grad_*", "gradients w.r.t.", scale="largest"),
    Stated("*", "*.param_grad_norms", "parameter gradient norms", scale="relative"),
    Stated("*", "*.greedy_last_scores", "logits"),
    Stated("*", "warp.out", "logits"),
    Stated("*", "*logits*", "logits"),
    Stated("*", "*scores", "beam scores"),
    Stated("*", "*.block[0-9]*", "hidden states"),
    Stated("*", "*.attn_out", "hidden states"),
    Stated("*", "*.mlp", "hidden states"),
    Stated("*", "*", "final_ln"),
)


def recognized(folder: Path) -> bool:
    """Whether the folder holds a ChatGLM checkpoint and cases, or rotary tables."""
    files = {path.name for path in folder.glob("*.npz")}
    return (folder / "weights" / "config.json").exists() and bool(files & STEPS.keys())


def steps(folder: Path) -> dict[str, Callable[[Replay], None]]:
    """{file: what replays it}."""
    reference = Reference(folder)
    return {name: functools.partial(_with, step, reference) for name, step in STEPS.items()}


def _with(step: Callable, reference: Reference, replay: Replay) -> None:
    step(replay, reference)


def text(replay: Replay, reference: Reference) -> None:
    """Whole sequences: every hidden state, attention probabilities, logits."""
    for name in replay.names("*.input_ids"):
        replay.attempt(_sequence, reference, name.removesuffix(".input_ids"))


def _sequence(replay: Replay, reference: Reference, name: str) -> None:
    model, params = reference.loaded
    ids = replay.input(f"{name}.input_ids")
    layout = layout_of(ids, reference.specials)
    mask = compare_layout(replay, name, layout)
    x, states, logits, seen = forward(model, params, ids, layout, capture=True)
    blocks = seen["layers"]["__call__"][0][0][0]
    replay.compare(f"{name}.embed", x)
    for number in range(model.depth):
        replay.compare(f"{name}.block{number}", blocks[number])
    replay.compare(f"{name}.final_ln", states)
    replay.compare(f"{name}.logits", logits)
    _last(replay, f"{name}.last_logits", logits)
    _inside(replay, name, model, layout, mask, seen)
    if f"{name}.tokenizer_position_ids" in replay:
        padded = glm_layout.left_padded([list(ids[0])], reference.specials)
        replay.compare(f"{name}.tokenizer_position_ids", padded.positions.transpose(0, 2, 1))
    if f"{name}.logits_alpha_num_layers" in replay:
        other = model.clone(alpha=(2 * model.depth) ** 0.5)
        logits = forward(other, params, ids, layout)[2]
        _last(replay, f"{name}.logits_alpha_num_layers", logits)


def _last(replay: Replay, name: str, logits: jax.Array) -> None:
    """Logits of the last positions, as many as are recorded."""
    if name in replay:
        shape = replay.recorded(name).shape
        replay.compare(name, logits[:, -1] if len(shape) == 2 else logits[:, -shape[1] :])


def _inside(
    replay: Replay, name: str, model: glm.ChatGLM, layout: tuple, mask: jax.Array, seen: dict
) -> None:
    """Recorded values inside the blocks; layer axis first in `seen`."""
    inside = {path: leaf[0] for path, leaf in rules.flatten(seen["layers"]).items()}
    tables = glm.rotary_tables(jnp.asarray(layout[2]), model.width // model.heads)
    qkv = inside["attention/qkv/__call__"]
    flat = (*qkv.shape[1:3], -1)
    for i in range(model.depth):
        if not replay.names(f"{name}.attn{i}") + replay.names(f"{name}.b{i}.*"):
            continue
        query, key, value = (qkv[i, :, :, part] for part in range(3))
        turned = glm.rotate(query, *tables), glm.rotate(key, *tables)
        replay.compare(f"{name}.attn{i}", layers.attention_weights(*turned, mask))
        values = {
            "qkv": qkv[i].swapaxes(2, 3).reshape(flat),
            "query_layer": turned[0],
            "key_layer": turned[1],
            "value_layer": value,
            "ctx": layers.attention(*turned, value, mask).reshape(flat),
            "ln1": inside["attention_norm/__call__"][i],
            "attn_out": inside["attention/out/__call__"][i],
            "ln2": inside["feed_forward_norm/__call__"][i],
            "h_to_4h": inside["feed_forward/up/__call__"][i],
            "mlp": inside["feed_forward/__call__"][i],
        }
        for part, computed in values.items():
            replay.compare(f"{name}.b{i}.{part}", computed)


def compare_layout(replay: Replay, name: str, layout: tuple) -> jax.Array:
    """Positions and mask; returns the mask `[B, 1, T, T]`, true where a key is visible."""
    segments, context, positions = layout
    slots = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    mask = decoder_cache.visible(segments, slots, segments, context, slots)
    replay.compare(f"{name}.position_ids", positions.transpose(0, 2, 1))
    replay.compare(f"{name}.attention_mask", ~np.asarray(mask))
    return mask


def batch(replay: Replay, reference: Reference) -> None:
    """A training batch with gradients, and a batch padded on the left."""
    if replay.names("train.*"):
        replay.attempt(_training, reference)
    if replay.names("leftpad.*"):
        replay.attempt(chatglm_decode.left_padded, reference)


def _training(replay: Replay, reference: Reference) -> None:
    model, params = reference.loaded
    ids = replay.input("train.input_ids")
    layout = layout_of(ids, reference.specials)
    compare_layout(replay, "train", layout)
    rows = [glm_layout.sequence(one, reference.specials) for one in ids]
    answers = max(len(row.targets) for row in rows)
    packed = token_rows.pack([[row] for row in rows], ids.shape[1], answers, reference.specials.pad)
    labels = chatglm_media.labels_of(packed)
    replay.compare("train.labels", labels)
    x, _, logits, _ = forward(model, params, ids, layout)
    replay.compare("train.logits", logits)
    replay.compare("train.nll", chatglm_media.token_losses(logits, labels))
    loss, (by_params, by_x) = _gradients(model, params, x, layout, packed)
    replay.compare("train.loss", loss)
    replay.compare("train.grad_embeds", by_x)
    if "train.param_grad_norms" in replay:
        # Word embeddings also receive what arrives through the inputs.
        by_words = np.asarray(by_params["embedding"]).copy()
        np.add.at(by_words, ids, np.asarray(by_x))
        table = chatglm.rows(model.depth, model.heads)
        named = export_tree(table, by_params | {"embedding": by_words})
        order = replay.input("train.param_names", text=True)
        norms = [np.linalg.norm(named[name]) for name in order]
        replay.compare("train.param_grad_norms", norms)


def _gradients(model: glm.ChatGLM, params: Params, x: jax.Array, layout: tuple, packed: Any):
    """(loss, (gradient of the parameters, gradient of the embeddings))."""

    @jax.jit
    def run(params: Params, x: jax.Array):
        def loss(params: Params, x: jax.Array) -> jax.Array:
            states, _ = model.apply({"params": params}, x, *layout)
            head = functools.partial(model.apply, {"params": params}, method="logits")
            answers = (packed.answer_index, packed.targets, packed.weights)
            return answer_loss(head, states, *answers)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, x)

    return run(params, x)


def rotary(replay: Replay, reference: Reference) -> None:
    """Rotary tables of any number of channels, in both precisions."""
    for name in (n.removesuffix(".positions") for n in replay.names("*.positions")):
        positions = replay.input(f"{name}.positions")
        if f"{name}.inv_freq_f16" in replay:
            pairs = replay.recorded(f"{name}.inv_freq_f16").shape[0]
            frequencies = glm.rotary_frequencies(2 * pairs)
            replay.compare(f"{name}.inv_freq_f16", frequencies, exact=True)
        for number, table in enumerate(("cos", "sin")):
            for half, kind in ((False, "f32"), (True, "f16")):
                array = f"{name}.{table}_{kind}"
                if array in replay:
                    channels = replay.recorded(array).shape[1]
                    replay.compare(array, glm.rotary_table(positions, channels, half)[number])


def half(replay: Replay, reference: Reference) -> None:
    """A float16 checkpoint in float32 and in float16 arithmetic."""
    model, params = read_llm(replay.folder / "weights_fp16")
    ids = replay.input("input_ids")
    layout = layout_of(ids, reference.specials)
    wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    replay.compare("logits_f32math", forward(model, wide, ids, layout)[2])
    if "last_logits_f16math" in replay:
        narrow = model.clone(dtype=jnp.float16, half_angles=True)
        _last(replay, "last_logits_f16math", forward(narrow, params, ids, layout)[2])


STEPS = {
    "cases_text.npz": text,
    "cases_batch.npz": batch,
    "cases_decode.npz": chatglm_decode.decoding,
    "cases_multimodal.npz": chatglm_media.media,
    "cases_fp16.npz": half,
    "rotary.npz": rotary,
}
