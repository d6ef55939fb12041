"""The stage-1 ASR model: the whole model, its decoding and its losses, against recordings."""

from __future__ import annotations

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recording import Recording

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources.cif_asr import DROPPED, decoder_layer_rows, rows
from xllm_jax.core import rules
from xllm_jax.models import asr, asr_search
from xllm_jax.models.cif import CIF
from xllm_jax.models.conformer import SpeechEncoder
from xllm_jax.models.speech_interface import SpeechInterface
from xllm_jax.objectives import asr as objective


def scaled(recording, name, value, tolerance=1e-4):
    largest = float(np.abs(recording.arrays[name]).max(initial=0.0))
    recording.close(name, value, atol=tolerance * max(1.0, largest))


class RecordedModel:
    """The recorded model in our form: networks, parameters, inputs."""

    def __init__(self, golden):
        self.recording = Recording(golden / "speech" / "asr_model.npz")
        self.about = json.loads((golden / "speech" / "asr_model.json").read_text("utf-8"))
        args = self.about["args"]
        pools = tuple(int(layer) for layer in args["pooling_layer_ids"].split(","))
        channels = int(args["conv2d_output_channels"])
        self.networks = {
            "speech_encoder": SpeechEncoder(
                width=args["encoder_embed_dim"],
                hidden=args["encoder_ffn_embed_dim"],
                heads=args["encoder_attention_heads"],
                kernel=args["conformer_depthwise_conv_kernel_size"],
                depth=args["encoder_layers"],
                pools=pools,
                channels=channels,
                bins=args["input_feat_per_channel"],
                dropout=args["dropout"],
                mask_padding=False,
            ),
            "speech_interface": SpeechInterface(
                encoder_width=args["encoder_embed_dim"],
                max_tokens=self.recording.arrays["eval/cif_out"].shape[1],
                kernel=args["conv_cif_width"],
                threshold=args["cif_threshold"],
                tail_threshold=args["tail_handling_firing_threshold"],
                recorded_padding=True,
            ),
            "asr_decoder": asr.ASRDecoder(
                vocab=len(self.about["symbols"]),
                width=args["decoder_embed_dim"],
                hidden=args["decoder_ffn_embed_dim"],
                heads=args["decoder_attention_heads"],
                self_blocks=args["decoder_layers"],
                dropout=args["decoder_dropout"],
            ),
        }
        self.table = rows(
            args["encoder_attention_heads"],
            args["encoder_layers"],
            pools,
            channels,
            args["decoder_attention_heads"],
            args["decoder_layers"],
            args["conv_cif_width"],
        )
        self.params = self.load()

    def load(self):
        get, names = self.recording.input, self.recording.names("model/*")
        source = {name.removeprefix("model/"): get(name) for name in names}
        shapes = {
            "speech_encoder": self.shapes("speech_encoder"),
            "speech_interface": {"cif": self.shapes("speech_interface", "fire")["cif"]},
            "asr_decoder": self.shapes("asr_decoder"),
        }
        return import_tree(self.table, source, shapes, drop=DROPPED)[0]

    def shapes(self, part, method="__call__"):
        network = self.networks[part]
        init = functools.partial(network.init, method=method)
        return jax.eval_shape(init, jax.random.key(0), *network.example())["params"]

    def apply(self, part, *inputs, **options):
        return self.networks[part].apply({"params": self.params[part]}, *inputs, **options)

    def batch(self):
        get = self.recording.input
        return {
            "features": get("src"),
            "lengths": get("src_len"),
            "tokens": get("target"),
            "token_lengths": get("target_len"),
        }


@pytest.mark.golden
def test_recorded_model(golden):
    model = RecordedModel(golden)
    recording = model.recording
    fired = check_encoder(model)
    check_decoder(model, fired)
    check_decoding(model, fired)
    check_training(model)
    for name, tensor in export_tree(model.table, model.params).items():
        np.testing.assert_array_equal(tensor, recording.arrays[f"model/{name}"])
    recording.assert_all_used()


def check_encoder(model):
    recording, batch = model.recording, model.batch()
    network = model.networks["speech_encoder"]
    run = jax.jit(
        functools.partial(network.apply, capture_intermediates=True, mutable=["intermediates"])
    )
    (features, lengths), seen = run(
        {"params": model.params["speech_encoder"]}, batch["features"], batch["lengths"]
    )
    seen = seen["intermediates"]
    scaled(recording, "eval/subsample", seen["front_end"]["__call__"][0])
    scaled(recording, "eval/after_linear", seen["project"]["__call__"][0])
    number = 0
    for stack in sorted(name for name in seen if name.startswith("blocks_")):
        # The norm at the end of a block is its output.
        for layer in seen[stack]["output_norm"]["__call__"][0]:
            scaled(recording, f"eval/block{number}", layer)
            number += 1
    scaled(recording, "eval/encoder_out", features)
    steps = np.arange(features.shape[1])
    recording.equal("eval/encoder_pad_mask", steps >= np.asarray(lengths)[:, None])
    recording.equal("eval/conv_lengths", (batch["lengths"] - 1) // 2)
    return check_fired(model, features, lengths), features


def check_fired(model, features, lengths):
    recording = model.recording
    fired = jax.jit(functools.partial(model.apply, "speech_interface", method="fire"))(
        features, lengths
    )
    scaled(recording, "eval/cif_out", fired.embeddings)
    counts, frames = np.asarray(fired.counts), np.asarray(fired.frames)
    exists = np.arange(frames.shape[1]) < counts[:, None]
    recording.equal("eval/cif_mask", exists)
    scaled(recording, "eval/quantity", fired.quantity)
    recording.equal("eval/cif_durations", np.where(exists, np.diff(frames, prepend=0, axis=1), 0))
    return fired


def check_decoder(model, results):
    recording, (fired, features) = model.recording, results
    previous = recording.input("prev_output_tokens")
    np.testing.assert_array_equal(asr.previous_tokens(recording.input("target")), previous)
    run = functools.partial(
        model.apply, "asr_decoder", capture_intermediates=True, mutable=["intermediates"]
    )
    embeddings = fired.embeddings[:, : previous.shape[1]]
    (logits, ctc), seen = jax.jit(run)(previous, embeddings, features)
    scaled(recording, "eval/decoder_logits", logits)
    scaled(recording, "eval/ctc_logits", ctc)
    scaled(recording, "eval/decoder_states", seen["intermediates"]["norm"]["__call__"][0])


def check_decoding(model, results):
    fired, _ = results
    everywhere = jnp.full_like(fired.counts, fired.embeddings.shape[1])
    for name, recorded in model.about["decoding"].items():
        beams = int(name.removeprefix("beam").split("_")[0])
        # The recorded greedy search runs every row to the end of the batch and multiplies
        # probabilities; its result is cut afterwards.
        counts = everywhere if beams == 1 else fired.counts
        found = run_search(model, fired.embeddings, counts, beams)
        tokens, lengths = asr_search.cut_at_end(found.tokens[:, 0], fired.counts)
        for row, expected in enumerate(recorded):
            assert found.tokens[row, 0].tolist() == expected["raw"], name
            assert fired.counts[row] == expected["cif_length"]
            assert tokens[row, : lengths[row]].tolist() == expected["tokens"]
            score = float(found.scores[row, 0])
            score = np.exp(score) if beams == 1 else score
            assert score == pytest.approx(expected["score"], rel=1e-4)


def run_search(model, embeddings, counts, beams):
    run = jax.jit(functools.partial(asr_search.search, model.networks["asr_decoder"], beams=beams))
    return run(model.params["asr_decoder"], embeddings, counts)


def check_training(model):
    batch = model.batch()
    composed = types.SimpleNamespace(networks=model.networks)
    trainable, fixed = rules.split([r".*/(?!(mean|variance)$)[^/]*"], model.params)

    def total(trainable):
        params = rules.join(trainable, fixed)
        outputs = objective.forward(composed, params, batch, train=True)
        parts = objective.terms(
            outputs.logits,
            outputs.ctc_logits,
            outputs.lengths,
            outputs.fired.quantity,
            batch["tokens"],
            batch["token_lengths"],
        )
        weights = model.about["criterion"]
        loss = objective.combine(parts, weights["quantity_loss_lambda"], weights["ctc_loss_lambda"])
        return loss, (parts, outputs)

    compute = jax.jit(jax.value_and_grad(total, has_aux=True))
    (loss, (parts, outputs)), gradients = compute(trainable)
    check_outputs(model, loss, parts, outputs)
    check_gradients(model, rules.join(gradients, jax.tree.map(np.zeros_like, fixed)))


def check_outputs(model, loss, parts, outputs):
    recording, fired = model.recording, outputs.fired
    scaled(recording, "train/encoder_out", outputs.features)
    tokens = recording.arrays["train/cif_out"].shape[1]
    scaled(recording, "train/cif_out", fired.embeddings[:, :tokens])
    recording.equal("train/cif_mask", np.arange(tokens) < np.asarray(fired.counts)[:, None])
    scaled(recording, "train/quantity", fired.quantity)
    scaled(recording, "train/decoder_logits", outputs.logits)
    scaled(recording, "train/ctc_logits", outputs.ctc_logits)
    recording.equal("train/sample_size", int(parts.count))
    for name, value in (
        ("loss", loss),
        ("ce_loss", parts.plain),
        ("ctc_loss", parts.ctc),
        ("quantity_loss", parts.quantity),
    ):
        recording.close(f"train/{name}", value, atol=0.0, rtol=1e-4)
    first = outputs.statistics["speech_encoder"]["blocks_0"]["convolution"]["batch_norm"]
    scaled(recording, "train/bn0_running_mean_after", first["mean"][0])
    scaled(recording, "train/bn0_running_var_after", first["variance"][0])


def check_gradients(model, tree):
    recording = model.recording
    gradients = export_tree(model.table, tree)
    for name in recording.names("train/grad/*"):
        expected = recording.arrays[name]
        value = gradients[name.removeprefix("train/grad/")]
        recording.close(name, value, atol=1e-3 * float(np.abs(expected).max()))
    largest = max(model.about["grad_norms"].values())
    for name, norm in model.about["grad_norms"].items():
        found = np.linalg.norm(gradients[name])
        assert found == pytest.approx(norm, rel=1e-3, abs=1e-6 * largest), name


@pytest.mark.golden
def test_recorded_cross_attention(golden):
    recording = Recording(golden / "speech" / "decoder_cross_attn.npz")
    about = json.loads((golden / "speech" / "decoder_cross_attn.json").read_text())["cfg"]
    heads, hidden = about["decoder_attention_heads"], about["decoder_ffn_embed_dim"]
    source = {n.removeprefix("layer/"): recording.input(n) for n in recording.names("layer/*")}
    block = asr.DecoderBlock(heads, hidden)
    x, features = recording.input("x"), recording.input("ctx")
    real = ~recording.input("self_pad_mask")
    causal = np.tril(np.ones((x.shape[1],) * 2, bool))
    mask = (causal & real[:, None])[:, None]
    contexts = {
        "out_ctx_masked": asr.Context(features, ~recording.input("ctx_pad_mask")),
        "out_ctx_unmasked": asr.Context(features),
        "out_ctx_zero": asr.Context(np.zeros_like(features[:, :1])),
        "out_no_ctx": None,
    }
    shapes = jax.eval_shape(
        block.init, jax.random.key(0), x, None, None, mask, asr.Context(features)
    )["params"]
    params, _ = import_tree(decoder_layer_rows("", "", heads, cross=True), source, shapes)
    run = jax.jit(lambda context: block.apply({"params": params}, x, None, None, mask, context)[0])
    for name, context in contexts.items():
        recording.close(name, run(context), atol=2e-5)
    recording.assert_all_used()


@pytest.mark.golden
def test_recorded_losses(golden):
    recording = Recording(golden / "speech" / "losses.npz")
    about = json.loads((golden / "speech" / "losses.json").read_text())
    get = recording.input
    lengths = (~get("encoder_pad_mask")).sum(-1)
    np.testing.assert_array_equal(get("cif_mask").shape, get("decoder_logits").shape[:2])
    check_tokens(recording)
    ctc = jax.jit(objective.ctc_losses)
    targets, counts = get("target"), get("target_len")
    recording.close("per_utt_ctc", ctc(get("ctc_logits"), lengths, targets, counts), atol=1e-4)
    frames = get("ctc_logits").shape[1]
    short = np.array([frames, frames - 3, 4, 2])
    found = np.asarray(ctc(get("ctc_logits"), short, targets, counts))
    expected = get("per_utt_ctc_too_short")
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for name, variant in about["variants"].items():
        check_variant(recording, name, variant, about["ids"], lengths)
    recording.assert_all_used()


def check_tokens(recording):
    logits = recording.input("decoder_logits")
    width = logits.shape[1]
    targets = recording.input("target")[:, :width]
    valid = np.arange(width) < recording.input("target_len")[:, None]
    smoothed, plain = objective.smoothed_cross_entropy(logits, targets, 0.1)
    recording.close("per_token_smoothed_ce", np.where(valid, smoothed, 0), atol=1e-4)
    recording.close("per_token_nll", np.where(valid, plain, 0), atol=1e-4)


def check_variant(recording, name, variant, ids, lengths):
    get, options = recording.input, variant["overrides"]
    targets, counts = get("target"), get("target_len")
    size = variant["sample_size"]
    if options.get("no_eos_label"):
        targets, counts = np.where(targets == ids["eos"], ids["pad"], targets), counts - 1

    def total(ctc_logits, logits, quantity):
        parts = objective.terms(
            logits,
            ctc_logits,
            lengths,
            quantity,
            targets,
            counts,
            variant["label_smoothing"],
            zero_infinity=False,
        )
        scale = size / len(counts) if options.get("boost_qtt_loss") else 1.0
        weights = variant["quantity_loss_lambda"], variant["ctc_loss_lambda"]
        loss = objective.combine(parts, *weights, scale)
        divisor = size if options.get("no_comb_loss_sum") else 1.0
        return loss / divisor, (loss, parts, scale)

    inputs = get("ctc_logits"), get("decoder_logits"), get("quantity")
    compute = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (returned, (loss, parts, scale)), gradients = compute(*inputs)
    for key, value in (
        ("loss", loss),
        ("returned_loss", returned),
        ("ce_loss", parts.plain),
        ("ctc_loss", parts.ctc),
        ("quantity_loss", parts.quantity * scale),
    ):
        recording.close(f"{name}/{key}", value, atol=0.0, rtol=1e-4)
    for key, value in zip(("ctc_logits", "decoder_logits", "quantity"), gradients):
        recording.close(f"{name}/d_{key}", value, atol=1e-4)
    if not options.get("no_eos_label"):
        recording.equal(f"{name}/sample_size", int(parts.count))
    else:  # the reference still divides by the length with the end token
        recording.equal(f"{name}/sample_size", int(parts.count) + len(counts))


SMALL = dict(vocab=12, width=16, hidden=24, heads=2, self_blocks=1)


def small_decoder(**fields):
    decoder = asr.ASRDecoder(**{**SMALL, **fields}, dropout=0.0)
    params = jax.jit(decoder.init)(jax.random.key(0), *decoder.example())["params"]
    return decoder, params


def test_multimodal_blocks_use_their_contexts():
    """Zero vectors stand in for a missing context, and a real one changes the logits."""
    decoder, params = small_decoder(
        visual_blocks=1, linguistic_blocks=1, visual_width=6, linguistic_width=5
    )
    rng = np.random.default_rng(0)
    previous = rng.integers(4, 12, (2, 5))
    embeddings = rng.normal(size=(2, 5, 16)).astype(np.float32)
    visual, linguistic = (
        asr.Context(rng.normal(size=(2, 3, width)).astype(np.float32)) for width in (6, 5)
    )
    run = jax.jit(
        lambda v, t: decoder.apply({"params": params}, previous, embeddings, None, v, t)[0]
    )
    nothing = run(None, None)
    zeros = run(asr.Context(np.zeros((2, 1, 6))), asr.Context(np.zeros((2, 1, 5))))
    np.testing.assert_allclose(nothing, zeros, atol=1e-6)
    for contexts in ((visual, None), (None, linguistic)):
        assert np.abs(run(*contexts) - nothing).max() > 1e-3


@pytest.fixture(scope="module")
def searched():
    """A small multimodal decoder and its greedy and beam search of random embeddings."""
    decoder, params = small_decoder(visual_blocks=1, visual_width=6)
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(3, 6, 16)).astype(np.float32)
    counts = np.array([6, 4, 0])
    visual = asr.Context(rng.normal(size=(3, 2, 6)).astype(np.float32))
    search = jax.jit(asr_search.search, static_argnums=(0, 4))
    greedy = search(decoder, params, embeddings, counts, 1, visual)
    beams = search(decoder, params, embeddings, counts, 3, visual)
    return decoder, params, embeddings, counts, visual, greedy, beams


def test_cached_steps_equal_teacher_forcing(searched):
    """Scores of the search are those of the whole decoder over the found tokens."""
    decoder, params, embeddings, counts, visual, greedy, beams = searched
    for found, rank in ((greedy, 0), (beams, 0), (beams, 2)):
        tokens = found.tokens[:, rank]
        previous = asr.previous_tokens(tokens)
        logits, _ = decoder.apply({"params": params}, previous, embeddings, None, visual)
        logs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]
        scores = jnp.where(np.arange(6) < counts[:, None], chosen, 0).sum(-1)
        np.testing.assert_allclose(found.scores[:2, rank], scores[:2], atol=1e-4)


def test_beams_are_sorted_distinct_and_as_long_as_their_row(searched):
    *_, counts, _, greedy, beams = searched
    assert np.all(np.diff(beams.scores[:2], axis=1) <= 0)
    assert np.all(beams.scores[:2, 0] >= greedy.scores[:2, 0] - 1e-5)
    assert len({tuple(row) for row in beams.tokens[0].tolist()}) == 3
    assert np.all((beams.tokens != asr.PAD).sum(-1)[:2] <= counts[:2, None])
    assert np.all(beams.tokens[2] == asr.PAD)


def test_hypotheses_are_cut_at_the_first_end():
    tokens = jnp.array([[5, 6, 2, 7, 2], [5, 6, 7, 8, 9], [2, 5, 5, 5, 5]])
    cut, lengths = asr_search.cut_at_end(tokens, jnp.array([5, 3, 5]))
    assert lengths.tolist() == [2, 3, 0]
    assert cut.tolist() == [[5, 6, 1, 1, 1], [5, 6, 7, 1, 1], [1] * 5]


def test_ctc_leaves_impossible_rows_without_gradient():
    logits = jax.random.normal(jax.random.key(0), (3, 6, 5))
    targets = jnp.array([[1, 1, 1, 1], [1, 2, 3, 4], [1, 2, 0, 0]])

    def total(logits):
        losses = objective.ctc_losses(logits, jnp.array([6, 6, 6]), targets, jnp.array([4, 4, 2]))
        return jnp.where(jnp.isinf(losses), 0, losses).sum(), losses

    gradient, losses = jax.jit(jax.grad(total, has_aux=True))(logits)
    assert np.isinf(losses).tolist() == [True, False, False]
    assert np.isfinite(gradient).all() and not np.any(gradient[0])


def test_empty_rows_change_nothing():
    """A row without an utterance has no share in the loss, the counts or the gradients."""
    rng = np.random.default_rng(0)
    encoder = SpeechEncoder(
        width=16, hidden=24, heads=2, kernel=3, depth=1, pools=(), channels=2, bins=10, dropout=0.0
    )
    networks = {
        "speech_encoder": encoder,
        "speech_interface": OnlyCIF(max_tokens=4),
        "asr_decoder": asr.ASRDecoder(**SMALL, dropout=0.0),
    }
    model = types.SimpleNamespace(networks=networks)
    batch = {
        "features": rng.normal(size=(2, 30, 10)).astype(np.float32),
        "lengths": np.array([30, 25]),
        "tokens": np.array([[4, 5, 6, 2], [7, 2, 1, 1]]),
        "token_lengths": np.array([4, 2]),
    }
    params = {
        name: jax.jit(network.init)(jax.random.key(0), *network.example())["params"]
        for name, network in networks.items()
    }
    empty = {
        name: np.concatenate([x, np.full_like(x[:1], name == "tokens")])
        for name, x in batch.items()
    }
    run = jax.jit(lambda p, b: objective.loss(model, p, b, train=True))
    (loss, metrics), (same, others) = run(params, batch), run(params, empty)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), metrics, others)
    assert float(metrics["count"]) == 6
    known = rules.flatten(params)
    assert metrics["assign"] and all(
        known[path].shape == value.shape for path, value in metrics["assign"].items()
    )


class OnlyCIF(CIF):
    """CIF instead of the whole interface."""

    def example(self):
        return jnp.zeros((1, 2, 16)), jnp.full(1, 2, jnp.int32)

    def fire(self, *inputs, **options):
        return self(*inputs, **options)
