"""Recorded C-Former: BERT over CIF embeddings, the adapter, and their gradients."""

from __future__ import annotations

import jax
import numpy as np

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources import bert
from xllm_jax.convert.sources.cif_asr import interface_rows
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core.errors import UserError
from xllm_jax.models.speech_interface import SpeechInterface

WEIGHTS = ("pre_", "post_", "speech_bert")  # how the names of the reference's tensors start


def c_former(replay: Replay) -> None:
    """Embeddings for the LLM and gradients of sum(embeddings * R)."""
    about = replay.about()["bert"]
    inputs, mask = replay.input("speech_input"), replay.input("attention_mask")
    network = SpeechInterface(
        encoder_width=inputs.shape[-1],
        max_tokens=inputs.shape[1],
        width=about["hidden_size"],
        depth=about["num_hidden_layers"],
        heads=about["num_attention_heads"],
        hidden=about["intermediate_size"],
        positions=about["max_position_embeddings"],
        llm_width=replay.input("post_bert_proj.weight").shape[0],
        adapter_relu=True,
        mask_padding=False,
    )
    counts = mask.sum(-1)
    if not np.array_equal(mask, np.arange(mask.shape[1]) < counts[:, None]):
        raise UserError("padding must stand at the end of every row", field="attention_mask")
    table = interface_rows(about["num_hidden_layers"], about["num_attention_heads"])
    params, weights = _load(replay, network, table), replay.input("R")

    def total(params, inputs):
        out = network.apply({"params": params}, inputs, counts, method="read")
        return (out * weights).sum(), out

    compute = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (to_params, to_inputs), out = compute(params, inputs)
    replay.compare("out", out)
    replay.compare("d_speech_input", to_inputs)
    for name, gradient in export_tree(table, to_params).items():
        replay.compare(f"grad/{name}", gradient)


def _load(replay: Replay, network: SpeechInterface, table: tuple) -> dict:
    source = {name: replay.input(name) for name in replay.arrays if name.startswith(WEIGHTS)}
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
    shapes = {name: tree for name, tree in shapes.items() if name != "cif"}
    return import_tree(table, source, shapes, drop=bert.DROP)[0]
