"""Recorded LoRA: forward with adapters, merged and without them; their gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree
from xllm_jax.convert.sources import llama, peft_lora
from xllm_jax.convert.verify.nextgpt_llama import layout, network, shifted_loss
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core import rules
from xllm_jax.core.types import Params
from xllm_jax.models import lora


def adapters_of(table: tuple[Any, ...], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Adapters of a table in our layout."""
    flat = {
        row.target: np.stack([row.forward(tensors[name]) for name in row.names()]) for row in table
    }
    return rules.unflatten(flat)


def lora_on_attention(replay: Replay) -> None:
    """The one case of the file."""
    config = replay.about()["config"]
    model, params = network(config["model"], replay.weights("w/"))
    table = peft_lora.rows(model, config["target_modules"])
    adapters = adapters_of(table, replay.weights("lora/"))
    scale = config["lora_alpha"] / config["r"]
    ids, labels = replay.input("input_ids"), replay.input("labels")
    rows = layout(replay.input("attention_mask"))

    def run(adapters: Params, x: jax.Array, base: Params = params) -> Any:
        variables = {"params": lora.merge(base, adapters, scale)}
        states, _ = model.apply(variables, x, *rows)
        logits = model.apply(variables, states, method="logits")
        return shifted_loss(logits, labels), (states, logits)

    x = jnp.take(jnp.asarray(params["embedding"]), ids, axis=0)
    compute = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (loss, (states, logits)), (gradients, by_x) = compute(adapters, x)
    merged = lora.merge(params, adapters, scale)
    replay.compare("loss", loss)
    replay.compare("logits", logits)
    replay.compare("last_hidden", states)
    replay.compare("grad_inputs_embeds", by_x)
    replay.compare("merged_logits", run({}, x, merged)[1][1])
    replay.compare("logits_adapter_off", run({}, x)[1][1])
    for name, tensor in export_tree(llama.rows(model), merged).items():
        replay.compare(f"merged/{name}", tensor)
    for name, gradient in export_tree(table, gradients).items():
        replay.compare(f"grad/{name}", gradient)
