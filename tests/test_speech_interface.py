"""The speech interface: the recorded C-Former, padding, counts, and the signature."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recording import Recording

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources import bert
from xllm_jax.convert.sources.cif_asr import interface_rows
from xllm_jax.core import rules
from xllm_jax.models import speech_interface
from xllm_jax.models.speech_interface import SpeechInterface


def scaled(recording, name, value, tolerance):
    largest = float(np.abs(recording.arrays[name]).max(initial=0.0))
    recording.close(name, value, atol=tolerance * max(1.0, largest))


@pytest.mark.golden
def test_recorded_c_former(golden):
    recording = Recording(golden / "speech" / "cformer.npz")
    about = json.loads((golden / "speech" / "cformer.json").read_text())["bert"]
    get = recording.input
    inputs, mask, weights = get("speech_input"), get("attention_mask"), get("R")
    network = SpeechInterface(
        encoder_width=inputs.shape[-1],
        max_tokens=inputs.shape[1],
        width=about["hidden_size"],
        depth=about["num_hidden_layers"],
        heads=about["num_attention_heads"],
        hidden=about["intermediate_size"],
        positions=about["max_position_embeddings"],
        llm_width=recording.arrays["out"].shape[-1],
        adapter_relu=True,
        mask_padding=False,
    )
    counts = mask.sum(-1)
    np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < counts[:, None])
    table = interface_rows(about["num_hidden_layers"], about["num_attention_heads"])
    params = load(recording, network, table)

    def total(params, inputs):
        out = network.apply({"params": params}, inputs, counts, method="read")
        return (out * weights).sum(), out

    compute = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (to_params, to_inputs), out = compute(params, inputs)
    scaled(recording, "out", out, 2e-5)
    scaled(recording, "d_speech_input", to_inputs, 2e-4)
    gradients = export_tree(table, to_params)
    for name in recording.names("grad/*"):
        scaled(recording, name, gradients[name.removeprefix("grad/")], 2e-4)
    recording.assert_all_used()


def load(recording, network, table):
    names = [n for n in recording.arrays if n.startswith(("pre_", "post_", "speech_bert"))]
    source = {name: recording.input(name) for name in names}
    shapes = jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
    shapes = {name: tree for name, tree in shapes.items() if name != "cif"}
    return import_tree(table, source, shapes, drop=bert.DROP)[0]


@pytest.fixture(scope="module")
def small():
    """A small interface and its compiled call."""
    network = SpeechInterface(
        encoder_width=8, max_tokens=10, width=12, depth=1, heads=2, hidden=16, positions=16,
        llm_width=6, dropout=0.0,
    )  # fmt: skip
    params = jax.jit(network.init)(jax.random.key(0), *network.example())["params"]
    run = jax.jit(lambda x, n, c=None: network.apply({"params": params}, x, n, c))
    features = np.random.default_rng(0).normal(size=(4, 20, 8)).astype(np.float32)
    return network, params, run, features, np.array([20, 15, 6, 0])


def test_counts_are_those_asked_for(small):
    _, _, run, features, lengths = small
    wanted = np.array([7, 10, 3, 0])
    embeddings, counts = run(features, lengths, wanted)
    assert embeddings.shape == (4, 10, 6)
    np.testing.assert_array_equal(counts, wanted)
    behind = np.arange(10) >= wanted[:, None]
    assert not np.any(embeddings[behind]) and np.all(np.any(embeddings[~behind], axis=-1))


def test_predicted_embeddings_do_not_depend_on_padding(small):
    _, _, run, features, lengths = small
    embeddings, counts = run(features, lengths)
    noisy = features + 9.0 * (np.arange(20) >= lengths[:, None])[..., None]
    others, same = run(noisy.astype(np.float32), lengths)
    np.testing.assert_array_equal(counts, same)
    np.testing.assert_allclose(embeddings, others, atol=1e-5)
    assert counts[3] == 0 and np.all(counts[:3] > 0)


def test_bfloat16_changes_no_count(small):
    network, params, run, features, lengths = small
    half = network.clone(dtype=jnp.bfloat16)
    embeddings, counts = jax.jit(half.apply)({"params": params}, features, lengths)
    exact, same = run(features, lengths)
    np.testing.assert_array_equal(counts, same)
    assert embeddings.dtype == jnp.bfloat16
    error = np.linalg.norm(embeddings.astype(np.float32) - exact) / np.linalg.norm(exact)
    print(f"bfloat16 embeddings differ by {error:.1e} of their norm")
    assert error < 3e-2


def test_every_parameter_has_a_sharding():
    for size, fields in speech_interface.SIZES.items():
        network = SpeechInterface(**fields)
        tree = jax.eval_shape(network.init, jax.random.key(0), *network.example())["params"]
        rules.assign(speech_interface.SHARDING, tree, what=size, total=False)
        assert {"cif", "c_former", "adapter"} == set(tree)
