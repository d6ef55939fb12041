"""Rotary positions of causal decoders: plain, linear, LLaMA-3's and YaRN's frequencies.

Su et al. 2021 (arXiv 2104.09864), Peng et al. 2023 (YaRN, arXiv 2309.00071). A head's channel j
pairs with channel j + rotated / 2; channels behind the rotated ones keep their values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from xllm_jax.core import mesh
from xllm_jax.core.errors import UserError

Array = jax.Array
Number = float | int | bool


@dataclasses.dataclass(frozen=True)
class Rotary:
    """How the channels of a head turn with the position.

    Attributes:
      frequencies: angle per position of each pair of channels, float32.
      scale: factor on the tables, which YaRN has.
    """

    frequencies: tuple[float, ...]
    scale: float = 1.0

    def tables(self, positions: Array) -> tuple[Array, Array]:
        """`[B, T]` positions to cosines and sines, two `[B, T, 1, rotated]` float32."""
        frequency = jnp.asarray(self.frequencies, jnp.float32)
        angle = positions[..., None, None].astype(jnp.float32) * frequency
        angle = jnp.concatenate([angle, angle], axis=-1)
        return jnp.cos(angle) * self.scale, jnp.sin(angle) * self.scale


def turned(x: Array, span: int) -> Array:
    """Pairs of channels turned by a quarter: (-second, first), float32, exact.

    A TPU moves channels between its lanes slowly, and the layouts that its compiler chooses for
    that cost copies of queries and keys, forward and back (docs/preflight.md). There it is a
    product with ones.

    Args:
      x: `[B, T, heads, channels]`.
      span: every so many channels, which divide them, a channel j pairs with j + span / 2.
    """
    if mesh.kind() != "tpu":
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2, span // 2)
        return jnp.stack([-pairs[..., 1, :], pairs[..., 0, :]], axis=-2).reshape(x.shape)
    one, none = np.eye(span // 2, dtype=np.float32), np.zeros((span // 2, span // 2), np.float32)
    quarter = np.block([[none, one], [-one, none]])
    turn = np.kron(np.eye(x.shape[-1] // span, dtype=np.float32), quarter)
    return jnp.einsum(
        "bthd,de->bthe",
        x,
        turn.astype(x.dtype),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def rotate(x: Array, cosine: Array, sine: Array) -> Array:
    """Rotates the first channels of `[B, T, heads, head_dim]`, in float32; returned in x's dtype.

    Args:
      x: queries or keys.
      cosine, sine: `[B, T, 1, rotated]`.
    """
    rotated = cosine.shape[-1]
    turning = x[..., :rotated]
    made = turning.astype(jnp.float32) * cosine + turned(turning, rotated) * sine
    return jnp.concatenate([made.astype(x.dtype), x[..., rotated:]], axis=-1)


def make(channels: int, theta: float, scaling: Mapping[str, str | Number]) -> Rotary:
    """The rotary positions of a network.

    Args:
      channels: of a head, those that are rotated.
      theta: base of the frequencies.
      scaling: {} for the plain ones; else 'kind', a row of KINDS, and the keys that it reads, named
        as config.json has them.

    Raises:
      UserError: an odd number of channels, an unknown kind or key, one that is missing, or
        numbers that give no frequencies.
    """
    if channels < 2 or channels % 2:
        raise UserError(f"{channels} channels of a head make no pairs", field="head_dim")
    kind = scaling.get("kind", "plain")
    if kind not in KINDS:
        raise UserError(
            f"unknown kind {kind!r}", field="scaling.kind", hint=f"Choices: {', '.join(KINDS)}"
        )
    function, needed, optional = KINDS[str(kind)]
    given = {key: float(value) for key, value in scaling.items() if key != "kind"}
    for key in given.keys() - {*needed, *optional}:
        known = ", ".join((*needed, *optional)) or "none"
        raise UserError(f"{kind} has no key {key!r}", field="scaling", hint=f"Choices: {known}")
    for key in set(needed) - given.keys():
        raise UserError(f"{kind} needs {key!r}", field="scaling", hint="See config.json")
    exponent = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    with np.errstate(all="ignore"):
        plain = (1.0 / np.float32(theta) ** exponent).astype(np.float32)
        found, scale = function(plain, theta, **given)
    if not (np.isfinite(found).all() and math.isfinite(scale) and theta > 0):
        what = f"theta {theta} and {kind} scaling give no frequencies"
        raise UserError(what, field="scaling", hint="Correct config.json")
    return Rotary(tuple(float(value) for value in found), scale)


def _plain(plain: np.ndarray, theta: float) -> tuple[np.ndarray, float]:
    return plain, 1.0


def _linear(plain: np.ndarray, theta: float, factor: float) -> tuple[np.ndarray, float]:
    """Positions are divided by the factor."""
    return plain / np.float32(factor), 1.0


def _llama3(
    plain: np.ndarray,
    theta: float,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: float,
) -> tuple[np.ndarray, float]:
    """Long waves are divided by the factor, short ones stay, those between are mixed."""
    turns = original_max_position_embeddings * plain / (2 * math.pi)  # within the old length
    share = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    share = np.clip(share, 0, 1)
    return ((1 - share) * plain / factor + share * plain).astype(np.float32), 1.0


def _yarn(
    plain: np.ndarray,
    theta: float,
    factor: float,
    original_max_position_embeddings: float,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: float = True,
    attention_factor: float = 0.0,
    mscale: float = 0.0,
    mscale_all_dim: float = 0.0,
) -> tuple[np.ndarray, float]:
    """As `_llama3`, mixed by the channel's number; the tables grow with the factor."""
    channels = 2 * len(plain)

    def channel(turns: float) -> float:
        """Number of the pair that turns so often within the old length."""
        wave = original_max_position_embeddings / (turns * 2 * math.pi)
        return channels * math.log(wave) / (2 * math.log(theta))

    low, high = channel(beta_fast), channel(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, channels - 1)
    high += 0.001 if low == high else 0
    share = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
    mixed = plain / factor * share + plain * (1 - share)

    def growth(weight: float = 1.0) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = growth(mscale) / growth(mscale_all_dim) if mscale and mscale_all_dim else growth()
    return mixed.astype(np.float32), attention_factor or given


Kind = tuple[Callable[..., tuple[np.ndarray, float]], tuple[str, ...], tuple[str, ...]]
LENGTH = "original_max_position_embeddings"
KINDS: dict[str, Kind] = {  # {kind: (function, keys that it needs, keys that it may have)}
    "plain": (_plain, (), ()),
    "linear": (_linear, ("factor",), ()),
    "llama3": (_llama3, ("factor", "low_freq_factor", "high_freq_factor", LENGTH), ()),
    "yarn": (
        _yarn,
        ("factor", LENGTH),
        ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    ),
}
