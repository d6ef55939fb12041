"""The recorded stage-1 ASR model: encoder, CIF, decoder, search, losses and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.convert import export_tree, import_tree
from xllm_jax.convert.sources.cif_asr import DROPPED, decoder_layer_rows, rows
from xllm_jax.convert.verify.recording import Replay
from xllm_jax.convert.verify.speech_cif import durations, shown
from xllm_jax.core import rules
from xllm_jax.core.batch import TranscriptionBatch
from xllm_jax.models import asr, asr_search
from xllm_jax.models.cif import Fired
from xllm_jax.models.conformer import SpeechEncoder
from xllm_jax.models.speech_interface import SpeechInterface
from xllm_jax.models.xllm import XLLM
from xllm_jax.objectives import asr as objective

TRAINED = r".*/(?!(mean|variance)$)[^/]*"  # all but batch statistics


class Recorded:
    """The recorded model in our form: networks, parameters, inputs."""

    def __init__(self, replay: Replay):
        self.replay, self.about = replay, replay.about()
        args = self.about["args"]
        pools = tuple(int(layer) for layer in args["pooling_layer_ids"].split(","))
        self.networks = {
            "speech_encoder": _encoder(args, pools),
            "speech_interface": SpeechInterface(
                encoder_width=args["encoder_embed_dim"],
                max_tokens=_capacity(replay),
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
            int(args["conv2d_output_channels"]),
            args["decoder_attention_heads"],
            args["decoder_layers"],
            args["conv_cif_width"],
        )
        self.params = self._load()

    def _load(self) -> dict[str, Any]:
        shapes = {
            "speech_encoder": self._shapes("speech_encoder"),
            "speech_interface": {"cif": self._shapes("speech_interface", "fire")["cif"]},
            "asr_decoder": self._shapes("asr_decoder"),
        }
        source = self.replay.weights("model/")
        return import_tree(self.table, source, shapes, drop=DROPPED)[0]

    def _shapes(self, part: str, method: str = "__call__") -> dict[str, Any]:
        network = self.networks[part]
        init = functools.partial(network.init, method=method)
        return jax.eval_shape(init, jax.random.key(0), *network.example())["params"]

    def run(self, part: str, *inputs: object, capture: bool = False, **options: Any) -> Any:
        """The compiled network of a part; with its captured values when asked for."""
        if capture:
            options |= dict(capture_intermediates=True, mutable=["intermediates"])
        apply = jax.jit(functools.partial(self.networks[part].apply, **options))
        return apply({"params": self.params[part]}, *inputs)

    def batch(self) -> TranscriptionBatch:
        """The recorded utterances and their texts."""
        names = {"features": "src", "lengths": "src_len"}
        names |= {"tokens": "target", "token_lengths": "target_len"}
        recorded = {ours: self.replay.input(theirs) for ours, theirs in names.items()}
        return TranscriptionBatch(**recorded)


def _capacity(replay: Replay) -> int:
    """Tokens that can fire: one a frame and the tail, or as many as the longest text has."""
    return max(replay.input("src").shape[1] // 2 + 1, replay.input("target").shape[1])


def _encoder(args: dict[str, Any], pools: tuple[int, ...]) -> SpeechEncoder:
    return SpeechEncoder(
        width=args["encoder_embed_dim"],
        hidden=args["encoder_ffn_embed_dim"],
        heads=args["encoder_attention_heads"],
        kernel=args["conformer_depthwise_conv_kernel_size"],
        depth=args["encoder_layers"],
        pools=pools,
        channels=int(args["conv2d_output_channels"]),
        bins=args["input_feat_per_channel"],
        dropout=args["dropout"],
        mask_padding=False,
    )


def model(replay: Replay) -> None:
    """The whole model, evaluated, searched and trained for one step."""
    recorded = Recorded(replay)
    features, fired = _encode(replay, recorded)
    replay.attempt(_decode, recorded, features, fired)
    replay.attempt(_search, recorded, fired)
    if replay.names("train/*"):
        replay.attempt(_train, recorded)


def _encode(replay: Replay, recorded: Recorded) -> tuple[jax.Array, Fired]:
    batch = recorded.batch()
    inputs = batch.features, batch.lengths
    (features, lengths), seen = recorded.run("speech_encoder", *inputs, capture=True)
    seen = seen["intermediates"]
    replay.compare("eval/subsample", seen["front_end"]["__call__"][0])
    replay.compare("eval/after_linear", seen["project"]["__call__"][0])
    number = 0
    for stack in sorted(name for name in seen if name.startswith("blocks_")):
        # The norm at the end of a block is its output.
        for layer in seen[stack]["output_norm"]["__call__"][0]:
            replay.compare(f"eval/block{number}", layer)
            number += 1
    replay.compare("eval/encoder_out", features)
    steps = np.arange(features.shape[1])
    replay.compare("eval/encoder_pad_mask", steps >= np.asarray(lengths)[:, None])
    replay.compare("eval/conv_lengths", (batch.lengths - 1) // 2)
    fired = recorded.run("speech_interface", features, lengths, method="fire")
    tokens = shown(fired, replay.recorded("eval/cif_out").shape[1])
    fired = fired._replace(embeddings=fired.embeddings[:, :tokens], frames=fired.frames[:, :tokens])
    replay.compare("eval/cif_out", fired.embeddings)
    counts, frames = np.asarray(fired.counts), np.asarray(fired.frames)
    replay.compare("eval/cif_mask", np.arange(tokens) < counts[:, None])
    replay.compare("eval/quantity", fired.quantity)
    replay.compare("eval/cif_durations", durations(frames, counts))
    return features, fired


def _decode(replay: Replay, recorded: Recorded, features: jax.Array, fired: Fired) -> None:
    previous = replay.recorded("prev_output_tokens")
    replay.compare("prev_output_tokens", asr.previous_tokens(replay.input("target")))
    # Where fewer tokens fire than a text has, the reference cuts the text, or adds empty tokens.
    width = min(previous.shape[1], replay.recorded("eval/decoder_logits").shape[1])
    embeddings = fired.embeddings[:, :width]
    missing = width - embeddings.shape[1]
    embeddings = jnp.pad(embeddings, ((0, 0), (0, max(missing, 0)), (0, 0)))
    inputs = previous[:, :width], embeddings, features
    (logits, ctc), seen = recorded.run("asr_decoder", *inputs, capture=True)
    replay.compare("eval/decoder_logits", logits)
    replay.compare("eval/ctc_logits", ctc)
    replay.compare("eval/decoder_states", seen["intermediates"]["norm"]["__call__"][0])


def _search(replay: Replay, recorded: Recorded, fired: Fired) -> None:
    """Hypotheses and scores, which the settings' file records as lists."""
    everywhere = jnp.full_like(fired.counts, fired.embeddings.shape[1])
    limits = replay.tolerances.numbers("asr_model")
    for name, expected in recorded.about.get("decoding", {}).items():
        beams = int(name.removeprefix("beam").split("_")[0])
        # The recorded greedy search runs every row to the end of the batch and multiplies
        # probabilities; its result is cut afterwards.
        counts = everywhere if beams == 1 else fired.counts
        run = functools.partial(asr_search.search, recorded.networks["asr_decoder"], beams=beams)
        found = jax.jit(run)(recorded.params["asr_decoder"], fired.embeddings, counts)
        raw = [found.tokens[row, 0].tolist() for row in range(len(expected))]
        different = sum(ours != row["raw"] for ours, row in zip(raw, expected))
        replay.check(f"decoding.{name}", float(different), 0.0, "hypotheses that differ")
        tokens, lengths = asr_search.cut_at_end(found.tokens[:, 0], fired.counts)
        for row, one in enumerate(expected):
            cut = tokens[row, : lengths[row]].tolist(), int(fired.counts[row])
            different = float(cut != (one["tokens"], one["cif_length"]))
            replay.check(f"decoding.{name}", different, 0.0, f"row {row}, cut at its end")
        scores = np.asarray(found.scores[:, 0], np.float64)
        scores = np.exp(scores) if beams == 1 else scores
        recorded_scores = np.array([row["score"] for row in expected])
        error = np.abs(scores / recorded_scores - 1).max()
        replay.check(f"decoding.{name}", float(error), limits[1] if limits else 0.0, "scores")


def _train(replay: Replay, recorded: Recorded) -> None:
    batch = recorded.batch()
    composed = XLLM(networks=recorded.networks)
    trainable, fixed = rules.split([TRAINED], recorded.params)
    criterion = recorded.about["criterion"]
    weights = criterion["quantity_loss_lambda"], criterion["ctc_loss_lambda"]

    def total(trainable):
        params = rules.join(trainable, fixed)
        outputs = objective.forward(composed, params, batch, train=True)
        quantity, texts = outputs.fired.quantity, (batch.tokens, batch.token_lengths)
        logits = outputs.logits, outputs.ctc_logits
        parts = objective.terms(*logits, outputs.lengths, quantity, *texts)
        return objective.combine(parts, *weights), (parts, outputs)

    compute = jax.jit(jax.value_and_grad(total, has_aux=True))
    (loss, (parts, outputs)), gradients = compute(trainable)
    _compare_outputs(replay, loss, parts, outputs)
    tree = rules.join(gradients, jax.tree.map(np.zeros_like, fixed))
    named = export_tree(recorded.table, tree)
    for name, gradient in named.items():
        replay.compare(f"train/grad/{name}", gradient)
    _compare_norms(replay, recorded, named)


def _compare_outputs(replay: Replay, loss: jax.Array, parts: Any, outputs: Any) -> None:
    fired = outputs.fired
    replay.compare("train/encoder_out", outputs.features)
    tokens = shown(fired, replay.recorded("train/cif_out").shape[1])
    replay.compare("train/cif_out", fired.embeddings[:, :tokens])
    replay.compare("train/cif_mask", np.arange(tokens) < np.asarray(fired.counts)[:, None])
    replay.compare("train/quantity", fired.quantity)
    replay.compare("train/decoder_logits", outputs.logits)
    replay.compare("train/ctc_logits", outputs.ctc_logits)
    replay.compare("train/sample_size", int(parts.count))
    replay.compare("train/loss", loss)
    replay.compare("train/ce_loss", parts.plain)
    replay.compare("train/ctc_loss", parts.ctc)
    replay.compare("train/quantity_loss", parts.quantity)
    first = outputs.statistics["speech_encoder"]["blocks_0"]["convolution"]["batch_norm"]
    replay.compare("train/bn0_running_mean_after", first["mean"][0])
    replay.compare("train/bn0_running_var_after", first["variance"][0])


def _compare_norms(replay: Replay, recorded: Recorded, named: dict[str, np.ndarray]) -> None:
    """Norms of all gradients, against the README's share for gradients."""
    norms, limits = recorded.about.get("grad_norms", {}), replay.tolerances.numbers("asr_model")
    if not norms or len(limits) < 3:
        return
    noise = 1e-3 * limits[2] * max(norms.values())  # gradients that are zero but for rounding
    for name, norm in norms.items():
        error = abs(float(np.linalg.norm(named[name])) - norm)
        allowed = max(limits[2] * norm, noise)
        replay.check(f"grad_norms.{name}", error, allowed, "norm of the gradient")


def cross_attention(replay: Replay) -> None:
    """A decoder block with cross-attention: masked, unmasked, zero and absent contexts."""
    about = replay.about()["cfg"]
    heads, hidden = about["decoder_attention_heads"], about["decoder_ffn_embed_dim"]
    x, features = replay.input("x"), replay.input("ctx")
    causal = np.tril(np.ones((x.shape[1],) * 2, bool))
    mask = (causal & ~replay.input("self_pad_mask")[:, None])[:, None]
    contexts = {
        "out_ctx_masked": asr.Context(features, ~replay.input("ctx_pad_mask")),
        "out_ctx_unmasked": asr.Context(features),
        "out_ctx_zero": asr.Context(np.zeros_like(features[:, :1])),
        "out_no_ctx": None,
    }
    block = asr.DecoderBlock(heads, hidden)
    example = (x, None, None, mask, asr.Context(features))
    shapes = jax.eval_shape(block.init, jax.random.key(0), *example)["params"]
    table = decoder_layer_rows("", "", heads, cross=True)
    params, _ = import_tree(table, replay.weights("layer/"), shapes)
    run = jax.jit(lambda context: block.apply({"params": params}, x, None, None, mask, context)[0])
    for name, context in contexts.items():
        if name in replay:
            replay.compare(name, run(context))
