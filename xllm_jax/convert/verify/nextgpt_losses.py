"""Recorded training of NExT-GPT: stages 1 to 3, every kind of batch, from words to gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources import llama, nextgpt_projection, peft_lora
from xllm_jax.convert.verify.nextgpt_formats import PAD, Cases
from xllm_jax.convert.verify.nextgpt_llama import IGNORED, layout, network, shifted_loss
from xllm_jax.convert.verify.nextgpt_lora import adapters_of
from xllm_jax.convert.verify.recording import Replay, read_json
from xllm_jax.core.types import Params
from xllm_jax.data.text import nextgpt_format
from xllm_jax.models import lora
from xllm_jax.models.causal import Causal
from xllm_jax.models.outputs.projection import LAST, TransformerProjection
from xllm_jax.objectives.align import distances

LLM, PROJECT = "llama_model.", "llama_proj"
ADAPTED = "llama_model.base_model.model."
HEADS = {
    kind: f"gen_text_hidden_fcs{end}.0."
    for kind, end in (("image", ""), ("video", "_video"), ("audio", "_audio"))
}
PROMPT = "generate a caption"
SECOND = "second"  # the projection of a second layer, which begins as the first one


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The recorded networks as ours.

    Attributes:
      model: the LLM.
      heads: {kind: projection}.
      params: {'llm', 'input', 'lora', kind: parameters}.
      cases: tokenizer.
      added: rows of the tables that NExT-GPT added; scale: of the adapters.
    """

    model: Causal
    heads: Mapping[str, TransformerProjection]
    params: Mapping[str, Any]
    cases: Cases
    added: int = 0
    scale: float = 1.0


def read(replay: Replay, sizes: Mapping[str, int], heads: Mapping[str, np.ndarray]) -> Recorded:
    """The networks of a file.

    Args:
      replay: its file, with the LLM's weights.
      sizes: of the LLM.
      heads: weights of the projections and of the linear map for media.
    """
    weights = replay.weights("w/")
    tensors = {name.removeprefix(LLM): x for name, x in weights.items() if name.startswith(LLM)}
    config = dict(
        vocab_size=len(tensors[llama.WORDS]),
        hidden_size=sizes["d"],
        intermediate_size=sizes["inter"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        rms_norm_eps=sizes["eps"],
    )
    model, params = network(config, tensors)
    made: dict[str, Any] = {"llm": params}
    made["input"] = {"kernel": heads[f"{PROJECT}.weight"].T, "bias": heads[f"{PROJECT}.bias"]}
    projections = {}
    for kind, start in HEADS.items():
        width, llm_width = heads[f"{start}fc.weight"].shape
        projections[kind] = net = TransformerProjection(
            llm_width=llm_width,
            queries=heads[f"{start}query_embs"].shape[1],
            width=width,
            output_width=heads[f"{start}model.weight"].shape[0],
        )
        own = {name: x for name, x in heads.items() if name.startswith(start)}
        shapes = jax.eval_shape(net.init, jax.random.key(0), *net.example())["params"]
        made[kind], _ = import_tree(nextgpt_projection.rows(start), own, shapes)
    return Recorded(model, projections, made, Cases(replay.folder))


def stages(replay: Replay) -> None:
    """All cases of the file."""
    config = replay.about()["config"]
    found = read(replay, config["sizes"], replay.weights("w/"))
    added = config["vocabulary_with_added_tokens"] - config["base_vocabulary"]
    low = replay.weights("lora/")
    table = peft_lora.rows(found.model, peft_lora.TARGETS, ADAPTED)
    params = {**found.params, "lora": adapters_of(table, low)}
    told = read_json(replay.folder / "lora.json")["config"]  # as the recording's other adapters
    scale = told["lora_alpha"] / told["r"]
    found = dataclasses.replace(found, params=params, added=added, scale=scale)
    for case, settings in config["captions"].items():
        replay.attempt(_case, case, settings, found)


def _turns(case: str, text: Any, kind: str) -> list[nextgpt_format.Turn]:
    """What is said in one row of a batch."""
    if case.startswith("stage1"):
        return nextgpt_format.describe(text, PROMPT)
    if case.startswith("stage2"):
        return nextgpt_format.draw(nextgpt_format.caption(text), kind)
    return nextgpt_format.conversation(text)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A recorded batch: ids, labels and mask of whole rows, and the media in them.

    Attributes:
      ids, labels, mask: `[B, L]`.
      media: `[B, width]`, or None; its place is `at`.
      wanted: `[B, q, width]` embeddings of captions, or None.
      runs: `[B, n]` positions of the signal tokens.
    """

    ids: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    media: np.ndarray | None
    at: int
    wanted: np.ndarray | None
    runs: np.ndarray


def _inputs(replay: Replay, case: str, settings: Mapping[str, Any], found: Recorded) -> Inputs:
    """The batch, made from its words and compared."""
    kind = next((kind for kind in HEADS if kind in case.split("_")), "image")
    tokenizer, texts = found.cases.tokenizer, settings["output_texts"]
    rows = [nextgpt_format.encode(_turns(case, text, kind), tokenizer) for text in texts]
    length = replay.recorded(f"{case}/text_ids").shape[1]
    ids, labels, mask = nextgpt_format.batch(rows, length, PAD)
    for name, made in (("text_ids", ids), ("text_targets", labels), ("text_mask", mask)):
        replay.compare(f"{case}/{name}", made)
    media = settings.get("mm_paths")
    opened = nextgpt_format.PREFIX + (nextgpt_format.OPEN if media else "")
    prefix = [*tokenizer.start, *tokenizer.encode(opened), *([0] if media else [])]
    before = np.broadcast_to(np.asarray(prefix, np.int32), (len(ids), len(prefix)))
    ids = np.concatenate([before, ids], 1)
    labels = np.concatenate([np.full_like(before, IGNORED), labels], 1)
    mask = np.concatenate([np.ones_like(before), mask], 1)
    replay.compare(f"{case}/targets", labels)
    replay.compare(f"{case}/attention_mask", mask)
    wanted, runs = None, np.zeros((len(ids), 0), np.int32)
    if f"{case}/caption_embs" in replay:
        wanted = replay.input(f"{case}/caption_embs")
        wanted = wanted[:, None] if wanted.ndim == 2 else wanted
        pieces = nextgpt_format.signals(kind).split()
        first = (labels == tokenizer.find(pieces[0])).argmax(1)
        runs = first[:, None] + np.arange(len(pieces))
    vectors = np.stack([replay.input(f"media/{name}") for name in media]) if media else None
    return Inputs(ids, labels, mask, vectors, len(prefix) - 1, wanted, runs)


def _case(replay: Replay, case: str, settings: Mapping[str, Any], found: Recorded) -> None:
    inputs = _inputs(replay, case, settings, found)
    layers = settings.get("text_emb_to_img_layers", [LAST])
    kind = next((kind for kind in HEADS if kind in case.split("_")), "image")
    adapted = case.startswith("stage3")
    model, rows = found.model, layout(inputs.mask)
    scale = settings.get("loss_scale", 1)

    def run(params: Mapping[str, Any], delta: jax.Array) -> Any:
        llm = lora.merge(params["llm"], params["lora"], found.scale) if adapted else params["llm"]
        variables = {"params": llm}
        x = model.apply(variables, inputs.ids, method="embed")
        seen: dict[str, Any] = {}
        if inputs.media is not None:
            given = inputs.media @ params["input"]["kernel"] + params["input"]["bias"]
            x, seen["media_embeds"] = x.at[:, inputs.at].set(given), given[:, None]
        states, _, between = model.apply(variables, x, *rows, watched=inputs.runs)
        states += delta
        logits = model.apply(variables, states, method="logits")
        loss = shifted_loss(logits, inputs.labels)
        seen |= dict(inputs_embeds=x, last_hidden=states, logits=logits, ce_loss=loss)
        if inputs.wanted is not None:
            made, heads = _project(found, params, kind, layers, x, states, between, inputs.runs)
            seen |= heads
            seen["gen_loss"] = distances(made, inputs.wanted).mean()
            loss += scale * seen["gen_loss"]
        return loss, seen

    delta = jnp.zeros((*inputs.ids.shape, model.width))
    compute = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (loss, seen), (gradients, by_states) = compute(
        {**found.params, SECOND: found.params[kind]}, delta
    )
    seen |= dict(loss=loss, grad_last_hidden=by_states)
    seen |= _scores(seen["logits"], inputs.labels)
    seen["logits"] = seen["logits"][:1]
    for name, computed in seen.items():
        replay.compare(f"{case}/{name}", computed)
    _compare_gradients(replay, case, gradients, found, ADAPTED if adapted else LLM, kind)


def _project(
    found: Recorded,
    params: Mapping[str, Any],
    kind: str,
    layers: list[int],
    x: jax.Array,
    states: jax.Array,
    between: jax.Array,
    runs: np.ndarray,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of the heads' outputs, what goes in and out of each); all have the same weights."""
    places, seen, made = runs[..., None], {}, []
    embeddings = jnp.take_along_axis(x, places, axis=1)
    for number, layer in enumerate(layers):
        end = f"_{number}" if number else ""
        read = between[layer] if layer != LAST else jnp.take_along_axis(states, places, axis=1)
        variables = {"params": params[SECOND if number else kind]}
        made.append(found.heads[kind].apply(variables, read[:, None], embeddings))
        seen |= {f"head_x{end}": read, f"head_e{end}": embeddings, f"head_y{end}": made[-1]}
    return sum(made[1:], made[0]), seen


def _scores(logits: jax.Array, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Loss of each token, and the reference's accuracy, which counts one token too much."""
    scores = np.asarray(jax.nn.log_softmax(logits))
    wanted = labels[:, 1:]
    picked = np.take_along_axis(scores[:, :-1], np.maximum(wanted, 0)[..., None], -1)[..., 0]
    later, counts = labels[:, 2:], labels[:, 2:] != IGNORED
    right = (scores.argmax(-1)[:, 1:-1] == later) & counts
    accuracy = np.float32(right.sum() / (counts.sum() + 1.0))
    return {"nll": np.where(wanted != IGNORED, -picked, 0), "gen_acc": accuracy}


def _compare_gradients(
    replay: Replay, case: str, gradients: Params, found: Recorded, source: str, kind: str
) -> None:
    named = {
        f"{source}{name}": gradient
        for name, gradient in export_tree(llama.rows(found.model), gradients["llm"]).items()
    }
    named |= {
        f"{PROJECT}.weight": np.asarray(gradients["input"]["kernel"]).T,
        f"{PROJECT}.bias": gradients["input"]["bias"],
    }
    for number, part in enumerate((kind, SECOND)):
        start = HEADS[kind].replace(".0.", f".{number}.")
        named |= export_tree(nextgpt_projection.rows(start), gradients[part])
    table = peft_lora.rows(found.model, peft_lora.TARGETS, ADAPTED)
    named |= export_tree(table, gradients["lora"])
    for name, gradient in named.items():
        gradient = np.asarray(gradient)
        replay.compare(f"{case}/grad/{name}", gradient)
        if f"{case}/grad_norm/{name}" in replay:
            replay.compare(f"{case}/grad_norm/{name}", np.linalg.norm(gradient))
            replay.compare(f"{case}/grad_new_rows/{name}", gradient[-found.added :])
