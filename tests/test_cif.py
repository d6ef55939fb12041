"""Integrate-and-fire against the recordings of the author's loop over frames."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recording import Recording

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources.cif_asr import cif_rows
from xllm_jax.models import cif


def scaled(recording: Recording, name: str, value, tolerance: float) -> None:
    """Compares with a tolerance that grows with the largest expected value."""
    largest = float(np.abs(recording.arrays[name]).max(initial=0.0))
    recording.close(name, value, atol=tolerance * max(1.0, largest))


@pytest.fixture(scope="module")
def cases(golden):
    return json.loads((golden / "speech" / "cif_cases.json").read_text())


FIRE = jax.jit(cif.integrate_and_fire, static_argnums=(3, 5))


def fire(frames, alpha, lengths, counts, weights, capacity, firing):
    """Result and gradients of sum(embeddings * weights)."""

    def total(frames, alpha):
        fired = cif.integrate_and_fire(frames, alpha, lengths, capacity, counts, firing)
        return (fired.embeddings * weights).sum(), fired

    gradients, fired = jax.grad(total, (0, 1), has_aux=True)(frames, alpha)
    return fired, gradients


@pytest.mark.golden
def test_recorded_cases(golden, cases):
    recording = Recording(golden / "speech" / "cif_cases.npz")
    jitted = jax.jit(fire, static_argnums=(5, 6))
    for case, about in cases.items():
        check_case(recording, case, about, jitted)
    recording.assert_all_used()


def check_case(recording, case, about, jitted):
    def get(name):
        return recording.input(f"{case}/{name}")

    padded = get("pad_mask")
    lengths = (~padded).sum(-1)
    np.testing.assert_array_equal(padded, np.arange(padded.shape[1]) >= lengths[:, None])
    counts = get("target_len") if about["training"] else None
    tokens, capacity = recording.arrays[f"{case}/out"].shape[1], get("R").shape[1]
    firing = cif.Firing(
        about["theta"],
        about["tail_threshold"],
        about["tail_handling"],
        closing_frame=False,
        accidents=about["quirk"],
    )
    weights = np.where(np.arange(capacity)[None, :, None] < tokens, get("R"), 0)
    fired, gradients = run(jitted, get("h"), get("alpha"), lengths, counts, weights, firing)
    np.testing.assert_array_equal(fired.counts, about["fired_lengths"], err_msg=case)
    scaled(recording, f"{case}/out", fired.embeddings[:, :tokens], 1e-4)
    assert not np.any(fired.embeddings[:, tokens:])
    scaled(recording, f"{case}/d_h", gradients[0], 1e-4)
    scaled(recording, f"{case}/d_alpha", gradients[1], 1e-4)
    recording.close(f"{case}/quantity", fired.quantity, atol=1e-9, rtol=1e-6)
    alpha = cif.mask_weights(get("alpha"), lengths)
    alpha = alpha if counts is None else cif.scale_weights(alpha, counts)
    scaled(recording, f"{case}/alpha_scaled", alpha, 1e-6)
    mask = np.arange(tokens) < np.asarray(fired.counts)[:, None]
    if about["by"] == "CIF-HieraDist":  # it marks the first place of a row without any token
        mask[:, 0] = True
    recording.equal(f"{case}/out_mask", mask)
    if f"{case}/hd_out_mask" in recording.arrays:
        recording.equal(f"{case}/hd_out_mask", mask | (np.arange(tokens) == 0))
    if f"{case}/hd_durations" in recording.arrays:
        frames = np.asarray(fired.frames)[:, :tokens]
        recording.equal(f"{case}/hd_durations", durations(frames, np.asarray(fired.counts)))


def run(jitted, frames, alpha, lengths, counts, weights, firing, rows=6):
    """Calls `fire` with empty rows and room for more tokens, so that cases share compiled code."""
    batch, steps = alpha.shape
    capacity = max(steps, weights.shape[1])

    def fill(x, *sizes):
        return np.pad(x, [(0, size - length) for size, length in zip(sizes, x.shape)])

    fired, gradients = jitted(
        fill(frames, rows, *frames.shape[1:]),
        fill(alpha, rows, steps),
        fill(lengths, rows),
        None if counts is None else fill(counts, rows),
        fill(weights, rows, capacity, weights.shape[2]),
        capacity,
        firing,
    )
    return jax.tree.map(lambda x: x[:batch], (fired, gradients))


def durations(frames, counts):
    """Frames between one fired token and the next, the first counted from frame 0."""
    exists = np.arange(frames.shape[1]) < counts[:, None]
    return np.where(exists, np.diff(frames, prepend=0, axis=1), 0)


@pytest.mark.golden
def test_recorded_module(golden):
    recording = Recording(golden / "speech" / "cif_module.npz")
    about = json.loads((golden / "speech" / "cif_module.json").read_text())
    for variant, entry in about.items():
        check_module(recording, variant, entry["cfg"])
    recording.assert_all_used()


def check_module(recording, variant, settings):
    frames, lengths = recording.input("h"), (~recording.input("pad_mask")).sum(-1)
    counts, source = recording.input("target_len"), module_weights(recording, variant)
    projected = settings["cif_embedding_dim"] != settings["encoder_embed_dim"]
    table = cif_rows(
        "", "", settings["conv_cif_width"] * (settings["produce_weight_type"] == "conv"), projected
    )
    network = cif.CIF(
        max_tokens=recording.arrays[f"{variant}/eval_out"].shape[1],
        kernel=settings["conv_cif_width"] if settings["produce_weight_type"] == "conv" else 0,
        output_width=settings["cif_embedding_dim"] if projected else None,
        threshold=settings["cif_threshold"],
        tail_threshold=settings["tail_handling_firing_threshold"],
        tail=settings["apply_tail_handling"],
        closing_frame=False,
        mask_padding=False,
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), frames, lengths)["params"]
    params, _ = import_tree(table, source, shapes)
    apply = functools.partial(network.apply, capture_intermediates=True, mutable=["intermediates"])
    fired, seen = jax.jit(apply)({"params": params}, frames, lengths)
    scores = seen["intermediates"]["weight"]["__call__"][0][..., 0]
    scaled(recording, f"{variant}/alpha", jax.nn.sigmoid(scores), 1e-5)
    check_fired(recording, f"{variant}/eval", fired)
    check_training(recording, variant, network, params, frames, lengths, counts, table)


def module_weights(recording, variant):
    names = [
        n
        for n in recording.names(f"{variant}/*")
        if n.count("/") == 1 and n.endswith((".weight", ".bias"))
    ]
    return {name.split("/")[1]: recording.input(name) for name in names}


def check_fired(recording, prefix, fired):
    tokens = recording.arrays[f"{prefix}_out"].shape[1]
    scaled(recording, f"{prefix}_out", fired.embeddings[:, :tokens], 5e-5)
    recording.equal(f"{prefix}_mask", np.arange(tokens) < np.asarray(fired.counts)[:, None])
    recording.close(f"{prefix}_quantity", fired.quantity, atol=1e-9, rtol=1e-6)


def check_training(recording, variant, network, params, frames, lengths, counts, table):
    weights = recording.input(f"{variant}/train_R")
    network = network.clone(max_tokens=weights.shape[1])

    def total(params, frames):
        fired = network.apply({"params": params}, frames, lengths, counts, train=True)
        distance = jnp.abs(fired.quantity - counts).sum()  # the recorded loss has this term
        return (fired.embeddings * weights).sum() + 0.3 * distance, fired

    gradients = jax.jit(jax.grad(total, (0, 1), has_aux=True))
    (to_params, to_frames), fired = gradients(params, frames)
    check_fired(recording, f"{variant}/train", fired)
    scaled(recording, f"{variant}/train_d_h", to_frames, 2e-4)
    for name, gradient in export_tree(table, to_params).items():
        scaled(recording, f"{variant}/train_grad/{name}", gradient, 2e-4)


@pytest.fixture(scope="module")
def utterances():
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(6, 50, 8)).astype(np.float32)
    alpha = rng.uniform(0.05, 0.6, (6, 50)).astype(np.float32)
    return frames, alpha, np.array([50, 43, 31, 20, 7, 0])


@pytest.mark.parametrize("counts", [None, np.array([12, 11, 9, 4, 2, 0])])
def test_result_does_not_depend_on_padding(utterances, counts):
    """Alone or in a longer batch with rubbish behind the end, an utterance fires the same."""
    frames, alpha, lengths = utterances
    together = FIRE(frames, alpha, lengths, 24, counts)
    behind = np.full((6, 9, 8), 1e3, np.float32)
    wider = FIRE(
        np.concatenate([frames, behind], 1), np.pad(alpha, ((0, 0), (0, 9))), lengths, 24, counts
    )
    np.testing.assert_array_equal(together.counts, wider.counts)
    np.testing.assert_allclose(together.embeddings, wider.embeddings, atol=1e-5)
    for row in (0, 2, 4):
        size = lengths[row]
        alone = FIRE(
            frames[row : row + 1, :size],
            alpha[row : row + 1, :size],
            lengths[row : row + 1],
            24,
            None if counts is None else counts[row : row + 1],
        )
        assert alone.counts[0] == together.counts[row]
        np.testing.assert_allclose(alone.embeddings[0], together.embeddings[row], atol=1e-5)


def test_training_fires_the_wanted_number(utterances):
    frames, alpha, lengths = utterances
    counts = np.array([12, 20, 1, 19, 3, 0])
    fired = FIRE(frames, alpha, lengths, 24, counts)
    np.testing.assert_array_equal(fired.counts, counts)
    np.testing.assert_allclose(fired.quantity, cif.mask_weights(alpha, lengths).sum(-1))


def test_capacity_cuts_and_says_so(utterances):
    frames, alpha, lengths = utterances
    whole = FIRE(frames, alpha, lengths, 24)
    cut = FIRE(frames, alpha, lengths, 4)
    np.testing.assert_array_equal(cut.counts, np.minimum(whole.counts, 4))
    np.testing.assert_allclose(cut.embeddings, whole.embeddings[:, :4], atol=1e-6)


def test_bfloat16_fires_as_often_as_float32():
    """Weights are summed in float32, so the compute dtype changes embeddings but no count."""
    rng = np.random.default_rng(1)
    frames = jnp.asarray(rng.normal(size=(64, 300, 16)), jnp.bfloat16)
    alpha = jnp.asarray(rng.uniform(0, 0.4, (64, 300)), jnp.float32)
    lengths = rng.integers(20, 301, 64)
    half = FIRE(frames, alpha, lengths, 96)
    full = FIRE(frames.astype(jnp.float32), alpha, lengths, 96)
    assert half.embeddings.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.counts, full.counts)
    np.testing.assert_array_equal(half.frames, full.frames)
    error = np.abs(half.embeddings.astype(jnp.float32) - full.embeddings).max()
    assert error <= 2**-8 * float(np.abs(full.embeddings).max())


@pytest.mark.parametrize("counts", [None, np.array([0, 2])])
def test_gradient_is_finite_for_empty_rows(counts):
    def total(alpha):
        fired = cif.integrate_and_fire(jnp.ones((2, 5, 3)), alpha, jnp.array([0, 5]), 4, counts)
        return fired.embeddings.sum() + fired.quantity.sum()

    assert np.isfinite(jax.jit(jax.grad(total))(jnp.full((2, 5), 0.3))).all()
