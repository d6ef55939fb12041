"""Recorded losses of stage 1 (smoothed cross-entropy, CTC, quantity) and its learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from xllm_jax.convert.verify.recording import Replay
from xllm_jax.core import optim
from xllm_jax.core.errors import UserError
from xllm_jax.objectives import asr as objective


def losses(replay: Replay) -> None:
    """Single terms, then the whole loss in every recorded variant, with gradients."""
    about = replay.about()
    mask = replay.input("cif_mask") if "cif_mask" in replay else None
    if mask is not None and mask.shape != replay.recorded("decoder_logits").shape[:2]:
        raise UserError("not the shape of the logits", field="cif_mask")
    replay.attempt(_tokens, about["variants"])
    replay.attempt(_ctc)
    for name, variant in about["variants"].items():
        replay.attempt(_variant, name, variant, about["ids"])


def _tokens(replay: Replay, variants: Mapping[str, Any]) -> None:
    logits = replay.input("decoder_logits")
    width = min(logits.shape[1], replay.input("target").shape[1])
    logits, targets = logits[:, :width], replay.input("target")[:, :width]
    valid = np.arange(width) < replay.input("target_len")[:, None]
    smoothing = max(variant["label_smoothing"] for variant in variants.values())
    smoothed, plain = objective.smoothed_cross_entropy(logits, targets, smoothing)
    replay.compare("per_token_smoothed_ce", np.where(valid, smoothed, 0))
    replay.compare("per_token_nll", np.where(valid, plain, 0))


def _ctc(replay: Replay) -> None:
    logits, targets, counts = (replay.input(n) for n in ("ctc_logits", "target", "target_len"))
    run = jax.jit(objective.ctc_losses)
    replay.compare("per_utt_ctc", run(logits, _lengths(replay), targets, counts))
    if "per_utt_ctc_too_short" not in replay:
        return
    frames = logits.shape[1]
    rows = replay.recorded("per_utt_ctc_too_short").shape[0]
    short = np.array([frames, frames - 3, 4, 2])  # too short for their targets, so infinite
    if rows != len(short):
        raise UserError(f"is of {rows} utterances, not {len(short)}", field="per_utt_ctc_too_short")
    replay.compare("per_utt_ctc_too_short", run(logits, short, targets, counts))


def schedule(replay: Replay) -> None:
    """Learning rates of the recipe, and those of the authors' log, printed with six digits."""
    steps, logged = replay.input("steps"), replay.input("log_steps")
    with jax.enable_x64(True):
        recipe = optim.tri_stage(3e-4, 3e-6, 3e-6, 24000, 36000, 120000)
        log = optim.tri_stage(3e-4, 3e-6, 3e-6, 30000, 90000, 120000)
        rates, printed = (np.asarray(f(x)) for f, x in ((recipe, steps), (log, logged)))
    replay.compare("lr", rates)
    replay.compare("log_lr", printed, allowed=1e-5 * replay.recorded("log_lr"))


def _lengths(replay: Replay) -> np.ndarray:
    return (~replay.input("encoder_pad_mask")).sum(-1)


def _variant(replay: Replay, name: str, variant: Mapping[str, Any], ids: Mapping[str, int]) -> None:
    get, options, lengths = replay.input, variant["overrides"], _lengths(replay)
    targets, counts, size = get("target"), get("target_len"), variant["sample_size"]
    shortened = bool(options.get("no_eos_label"))
    if shortened:
        targets, counts = np.where(targets == ids["eos"], ids["pad"], targets), counts - 1

    def total(ctc_logits, logits, quantity):
        smoothing = variant["label_smoothing"]
        inputs = (logits, ctc_logits, lengths, quantity, targets, counts, smoothing)
        parts = objective.terms(*inputs, zero_infinity=False)
        scale = size / len(counts) if options.get("boost_qtt_loss") else 1.0
        weights = variant["quantity_loss_lambda"], variant["ctc_loss_lambda"]
        loss = objective.combine(parts, *weights, scale)
        divisor = size if options.get("no_comb_loss_sum") else 1.0
        return loss / divisor, (loss, parts, scale)

    names = ("ctc_logits", "decoder_logits", "quantity")
    compute = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
    (returned, (loss, parts, scale)), gradients = compute(*map(get, names))
    replay.compare(f"{name}/loss", loss)
    replay.compare(f"{name}/returned_loss", returned)
    replay.compare(f"{name}/ce_loss", parts.plain)
    replay.compare(f"{name}/ctc_loss", parts.ctc)
    replay.compare(f"{name}/quantity_loss", parts.quantity * scale)
    for key, value in zip(names, gradients):
        replay.compare(f"{name}/d_{key}", value)
    # Without the end token as a label the reference still divides by the length with it.
    replay.compare(f"{name}/sample_size", int(parts.count) + shortened * len(counts))
