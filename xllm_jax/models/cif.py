"""Continuous integrate-and-fire (CIF): speech frames to one embedding per text token.

Every frame has a weight alpha in (0, 1). Weights are accumulated over time; when the accumulator
reaches the threshold, the frames so far fire as one embedding, the weighted sum of the frames, and
what is left of the frame's weight starts the next one (paper, appendix A.2; recurrence of
MingLunHan/CIF-PyTorch `modules/cif_middleware.py`).

The recurrence needs no loop over frames. With S the cumulative sum of alpha, a frame fires when
S_t - n_{t-1} >= threshold, so the number fired by then is

    n_t = min(n_{t-1} + 1, floor(S_t + 1 - threshold))

(at most one per frame; the rest of a large weight fires on the following frames). Unrolled, that is
a cumulative minimum. Frame t then gives `left` to token n_{t-1} and `right` to token n_t:

    fires:     left = 1 - (S_{t-1} - n_{t-1}),  right = S_t - n_t
    otherwise: left = alpha_t,                  right = 0

and all embeddings are one product of that banded weight matrix with the frames. Weights are summed
in float32 whatever the compute dtype is: in bfloat16 the number of tokens would change.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from xllm_jax.models.dropout import Dropout
from xllm_jax.models.layers import Dense

Array = jax.Array


class Fired(NamedTuple):
    """What integrate-and-fire returns.

    Attributes:
      embeddings: `[batch, max_tokens, width]`, zero behind the last token.
      counts: `[batch]` int32, number of tokens, at most `max_tokens`.
      quantity: `[batch]` float32, sum of the unscaled weights: the predicted token count.
      frames: `[batch, max_tokens]` int32, the frame that completed each token (0 behind the last).
    """

    embeddings: Array
    counts: Array
    quantity: Array
    frames: Array


@dataclasses.dataclass(frozen=True)
class Firing:
    """How accumulated weights become tokens.

    Attributes:
      threshold: accumulated weight at which a token fires; 1.0 is subtracted, not the threshold.
      tail_threshold: at inference a rest above it fires as the last token, divided by its weight.
      tail: whether to look at the rest at all.
      closing_frame: end every row with one zero frame of its own, so that the result depends on
        nothing behind the row's length. False is the recorded behavior: that frame exists only
        where the batch is padded (no padding, no tail), and holds whatever the encoder left there.
      accidents: also follow two accidents of the reference: a token that is exactly zero does not
        count, and a backlog at the tail is cut to what the frame behind the end would leave of it.
    """

    threshold: float = 0.99
    tail_threshold: float = 0.5
    tail: bool = True
    closing_frame: bool = True
    accidents: bool = False


def mask_weights(alpha: Array, lengths: Array) -> Array:
    """Sets the weights `[batch, frames]` behind each row's length to zero, in float32."""
    valid = jnp.arange(alpha.shape[1]) < lengths[:, None]
    return jnp.where(valid, alpha.astype(jnp.float32), 0.0)


def scale_weights(alpha: Array, counts: Array) -> Array:
    """Scales masked weights `[batch, frames]` so that each row sums to its wanted token count."""
    return alpha * (counts.astype(jnp.float32) / (alpha.sum(-1) + 1e-8))[:, None]


def count_fired(total: Array, lengths: Array, threshold: float) -> Array:
    """Number of tokens fired up to and including each frame.

    Args:
      total: `[batch, frames]` cumulative weights.
      lengths: `[batch]` valid frames; a backlog may still fire on frame `length`, none later.
      threshold: see `Firing`.

    Returns:
      `[batch, frames]` float32 of whole numbers, without gradient.
    """
    steps = jnp.arange(total.shape[1], dtype=jnp.float32)
    due = jnp.floor(jax.lax.stop_gradient(total) + jnp.float32(1.0 - threshold))
    fired = steps + jnp.minimum(1.0, jax.lax.cummin(due - steps, axis=1))
    last = jnp.minimum(lengths, total.shape[1] - 1)[:, None]
    return jnp.minimum(fired, jnp.take_along_axis(fired, last, axis=1))


def shift_right(x: Array) -> Array:
    """Values of the previous frame, zero for the first one: `[batch, frames]`."""
    return jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]


def band(alpha: Array, total: Array, fired: Array, max_tokens: int) -> Array:
    """Weight of every frame in every token, `[batch, max_tokens, frames]` float32.

    Args:
      alpha: `[batch, frames]` weights of the frames.
      total: `[batch, frames]`, their sums up to and with each frame.
      fired: `[batch, frames]`, tokens that are complete by then.
      max_tokens: static number of tokens.
    """
    before, total_before = shift_right(fired), shift_right(total)
    fires = fired > before
    left = jnp.where(fires, 1.0 - (total_before - before), alpha)
    right = jnp.where(fires, total - fired, 0.0)
    token = jnp.arange(max_tokens, dtype=jnp.float32)[None, :, None]
    weights = jnp.where(before[:, None] == token, left[:, None], 0.0)
    return weights + jnp.where(fired[:, None] == token, right[:, None], 0.0)


def integrate_and_fire(
    frames: Array,
    alpha: Array,
    lengths: Array,
    max_tokens: int,
    counts: Array | None = None,
    firing: Firing = Firing(),
) -> Fired:
    """Turns frames and their weights into token embeddings.

    Args:
      frames: `[batch, frames, width]` encoder outputs.
      alpha: `[batch, frames]` weights, before masking and scaling.
      lengths: `[batch]` valid frames.
      max_tokens: static capacity; tokens beyond it are lost.
      counts: `[batch]` wanted token counts (training: the target length, end token included);
        None predicts: no scaling, and the tail is handled.
      firing: thresholds and options.

    Returns:
      `Fired`; embeddings in the dtype of `frames`, everything else summed in float32.
    """
    alpha = mask_weights(alpha, lengths)
    quantity = alpha.sum(-1)
    if counts is not None:
        alpha = scale_weights(alpha, counts)
    valid = jnp.arange(frames.shape[1]) < lengths[:, None]
    if firing.closing_frame:
        frames = jnp.where(valid[..., None], frames, 0)
        alpha = jnp.pad(alpha, ((0, 0), (0, 1)))
    total = jnp.cumsum(alpha, axis=1)
    tail = firing.tail and counts is None
    # Frame `length` either fires a backlog or closes the tail; with a tail it fires nothing.
    last = lengths - 1 if tail else lengths
    fired = count_fired(total, jnp.maximum(last, 0), firing.threshold)
    weights = band(alpha, total, fired, max_tokens)
    done = fired[:, -1].astype(jnp.int32)
    if tail:
        weights, done = fire_tail(weights, total[:, -1] - done, done, lengths, firing)
    exists = jnp.arange(max_tokens) < done[:, None]
    weights = jnp.where(exists[..., None], weights, 0.0)[..., : frames.shape[1]]
    embeddings = jnp.einsum("bst,btd->bsd", weights, frames.astype(jnp.float32))
    when = jnp.sum(fired[:, None] <= jnp.arange(max_tokens)[:, None], axis=-1, dtype=jnp.int32)
    when = jnp.where(exists, jnp.minimum(when, lengths[:, None]), 0)
    result = Fired(embeddings.astype(frames.dtype), jnp.minimum(done, max_tokens), quantity, when)
    return drop_zero_tokens(result) if firing.accidents else result


def fire_tail(
    weights: Array, rest: Array, done: Array, lengths: Array, firing: Firing
) -> tuple[Array, Array]:
    """Closes the open token of rows whose rest is above the tail threshold.

    Args:
      weights: `[batch, max_tokens, frames]`; a row without a frame behind its end has no tail.
      rest: `[batch]` weight that has not fired.
      done: `[batch]` tokens fired.
      lengths: `[batch]` valid frames.
      firing: thresholds and options.

    Returns:
      (weights with the open row divided by its sum, token counts with the tail).
    """
    is_open = (jnp.arange(weights.shape[1]) == done[:, None])[..., None]
    if firing.accidents:
        backlog = rest >= firing.threshold
        rest = jnp.where(backlog, rest - 1.0, rest)
        behind = jnp.arange(weights.shape[2]) == lengths[:, None, None]
        only_behind = jnp.where(behind, rest[:, None, None], 0.0)
        weights = jnp.where(is_open & backlog[:, None, None], only_behind, weights)
    keep = (rest > firing.tail_threshold) & (lengths < weights.shape[2])
    # The guard keeps the division's gradient finite in rows that have no tail.
    scale = 1.0 / (jnp.where(keep, rest, 1.0) + 1e-10)
    scale = jnp.where(is_open & keep[:, None, None], scale[:, None, None], 1.0)
    return weights * scale, done + keep


def drop_zero_tokens(fired: Fired) -> Fired:
    """Leaves out tokens whose embedding is exactly zero and closes the gaps."""
    kept = jnp.any(fired.embeddings != 0, axis=-1)
    order = jnp.argsort(~kept, axis=1, stable=True)
    return Fired(
        jnp.take_along_axis(fired.embeddings, order[..., None], axis=1),
        kept.sum(-1, dtype=jnp.int32),
        fired.quantity,
        jnp.take_along_axis(fired.frames, order, axis=1),
    )


def windows(x: Array, width: int) -> Array:
    """Neighborhoods of every frame, zero outside: `[batch, frames, width, dim]`."""
    before = (width - 1) // 2
    padded = jnp.pad(x, ((0, 0), (before, width - 1 - before), (0, 0)))
    return jnp.stack([padded[:, i : i + x.shape[1]] for i in range(width)], axis=2)


class CIF(nn.Module):
    """Weight predictor and integrate-and-fire: frames to token embeddings.

    Attributes:
      max_tokens: static number of embeddings per utterance.
      kernel: width of the convolution over a frame's neighbors; 0 for a dense layer with ReLU.
      output_width: width of a final projection; None for none.
      threshold, tail_threshold, tail, closing_frame: see `Firing`.
      mask_padding: zero the frames behind each length before the convolution sees them; the
        reference does not.
      dropout: rate after the convolution.
    """

    max_tokens: int
    kernel: int = 5
    output_width: int | None = None
    threshold: float = 0.99
    tail_threshold: float = 0.5
    tail: bool = True
    closing_frame: bool = True
    mask_padding: bool = True
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, frames: Array, lengths: Array, counts: Array | None = None, train: bool = False
    ) -> Fired:
        """Fires `frames` `[batch, frames, width]`; see `integrate_and_fire` for the rest."""
        width = frames.shape[-1]
        frames = frames.astype(self.dtype)
        if self.mask_padding:
            valid = jnp.arange(frames.shape[1]) < lengths[:, None]
            frames = jnp.where(valid[..., None], frames, 0)
        init = nn.initializers.xavier_uniform()
        if self.kernel:
            near = windows(frames, self.kernel)
            hidden = Dense(width, inputs=2, dtype=self.dtype, kernel_init=conv_init, name="conv")(
                near
            )
            hidden = Dropout(self.dropout)(hidden, train)
        else:
            hidden = nn.relu(Dense(width, dtype=self.dtype, kernel_init=init, name="dense")(frames))
        score = Dense(1, dtype=jnp.float32, kernel_init=init, name="weight")(hidden)
        alpha = nn.sigmoid(score[..., 0])
        firing = Firing(self.threshold, self.tail_threshold, self.tail, self.closing_frame)
        fired = integrate_and_fire(frames, alpha, lengths, self.max_tokens, counts, firing)
        if self.output_width is None:
            return fired
        project = Dense(
            self.output_width, use_bias=False, dtype=self.dtype, kernel_init=init, name="output"
        )
        return fired._replace(embeddings=project(fired.embeddings))


def conv_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    """Uniform initializer of a convolution by its fan-in, over all axes but the last.

    Args:
      key: random key.
      shape: of the parameter.
      dtype: of the parameter.
    """
    return nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=(0, 1))(
        key, shape, dtype
    )


SIZES = {"cif_asr": dict(max_tokens=64, kernel=5), "tiny": dict(max_tokens=24, kernel=5)}

SHARDING = (
    (r"(.*/)?cif/conv/kernel", P(None, "fsdp", "tensor")),
    (r"(.*/)?cif/dense/kernel", P("fsdp", "tensor")),
    (r"(.*/)?cif/output/kernel", P("fsdp", "tensor")),
    (r"(.*/)?cif/.*", P()),
)
