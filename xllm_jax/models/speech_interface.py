"""The speech interface: CIF, C-Former and adapter (paper, section 3.1).

CIF fires one embedding per text token, the C-Former (a BERT that reads embeddings) gives them
context, and the S-adapter maps them to the LLM's width. Stage 1 trains `cif` inside the ASR model,
stage 2 trains the rest, stage 3 the adapter alone.
"""

from __future__ import annotations

from typing import ClassVar, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from xllm_jax.models import bert, cif
from xllm_jax.models.layers import Dense

Array = jax.Array


class CFormer(bert.Sizes):
    """Projection of the CIF embeddings, then BERT layers.

    Attributes:
      positions: of the BERT encoder, as all of `bert.Sizes`.
      relu: ReLU after the projection, as the reference repository has it.
    """

    positions: int = 512
    relu: bool = True

    @nn.compact
    def __call__(self, embeddings: Array, counts: Array, train: bool = False) -> Array:
        """Maps `[batch, tokens, any]` with `counts` `[batch]` valid ones to `[.., width]`."""
        x = Dense(self.width, dtype=self.dtype, name="project")(embeddings)
        x = nn.relu(x) if self.relu else x
        mask = jnp.arange(x.shape[1]) < counts[:, None]
        encoder = bert.BertEncoder(**self.sizes(), positions=self.positions, name="bert")
        return cast(Array, encoder(mask=mask, embeddings=x, train=train))  # it has no pooler


class SpeechInterface(bert.Sizes):
    """Acoustic features to LLM embeddings, one per text token.

    Attributes:
      encoder_width: width of the features and of the CIF embeddings.
      max_tokens: static number of embeddings per utterance.
      positions, project_relu: of the C-Former, as all of `bert.Sizes`.
      llm_width: width of the LLM's embeddings.
      adapter_relu: ReLU behind the adapter, as the reference repository has it; the paper's
        adapter is linear.
      mask_padding: zero the embeddings behind each row's count; the reference lets the LLM see
        what the C-Former left there.
      kernel, threshold, tail_threshold: see `cif.CIF`.
      recorded_padding: let padded frames reach the CIF as in the reference (parity only).
    """

    encoder_width: int = 512
    max_tokens: int = 64
    positions: int = 512
    llm_width: int = 4096
    project_relu: bool = True
    adapter_relu: bool = False
    mask_padding: bool = True
    kernel: int = 5
    threshold: float = 0.99
    tail_threshold: float = 0.5
    recorded_padding: bool = False

    SECTIONS: ClassVar = (("cif",), ("c_former",), ("adapter",))

    def setup(self) -> None:
        self.cif = cif.CIF(
            self.max_tokens,
            self.kernel,
            threshold=self.threshold,
            tail_threshold=self.tail_threshold,
            closing_frame=not self.recorded_padding,
            mask_padding=not self.recorded_padding,
            dtype=self.dtype,
        )
        fields = self.sizes() | {"positions": self.positions, "relu": self.project_relu}
        self.c_former = CFormer(**fields)
        self.adapter = Dense(self.llm_width, dtype=self.dtype)

    def example(self) -> tuple[Array, Array]:
        """Arguments for `init`."""
        return jnp.zeros((1, 2, self.encoder_width)), jnp.full(1, 2, jnp.int32)

    def __call__(
        self,
        features: Array,
        lengths: Array,
        counts: Array | None = None,
        train: bool = False,
        sections: tuple[int, int] = (0, 3),
    ) -> tuple[Array, Array]:
        """Reads features into embeddings.

        Args:
          features: `[batch, frames, encoder_width]`; before a later step, what the one before gave.
          lengths: `[batch]` valid frames; 0 = no utterance. Before a later step, tokens.
          counts: `[batch]` tokens wanted (the transcript's, end token included); None predicts.
          train: switches dropout on.
          sections: which of SECTIONS, first and behind the last.

        Returns:
          (embeddings `[batch, max_tokens, llm_width]` in `dtype`, or what the last step gives;
          counts `[batch]` int32 of those that exist).
        """
        first, last = sections
        x, fired = features, lengths
        if first == 0:
            x, fired, *_ = self.fire(features, lengths, counts, train)
        if first <= 1 < last:
            x = self.c_former(x, fired, train)
        return (self.adapt(x, fired) if last == 3 else x), fired

    def fire(
        self, features: Array, lengths: Array, counts: Array | None = None, train: bool = False
    ) -> cif.Fired:
        """CIF alone, which is what the ASR model of stage 1 uses; arguments as in `__call__`.

        Args:
          features, lengths, counts, train: as in `__call__`.
        """
        return self.cif(features, lengths, counts, train)

    def read(self, embeddings: Array, counts: Array, train: bool = False) -> Array:
        """CIF embeddings `[batch, tokens, encoder_width]` to `[batch, tokens, llm_width]`.

        Args:
          embeddings: of CIF.
          counts: `[batch]` valid tokens.
          train: switches dropout on.
        """
        return self.adapt(self.c_former(embeddings, counts, train), counts)

    def adapt(self, x: Array, counts: Array) -> Array:
        """The C-Former's states `[batch, tokens, width]` to `[batch, tokens, llm_width]`."""
        x = self.adapter(x)
        x = nn.relu(x) if self.adapter_relu else x
        if not self.mask_padding:
            return x
        return jnp.where((jnp.arange(x.shape[1]) < counts[:, None])[..., None], x, 0)


SIZES = {
    "x_llm": dict(),
    "tiny": dict(
        encoder_width=96, max_tokens=24, width=96, depth=4, heads=4, hidden=192, positions=128,
        llm_width=128, dropout=0.0,
    ),
}  # fmt: skip

SHARDING = (
    *cif.SHARDING,
    (r"c_former/project/kernel", P("fsdp", "tensor")),
    (r"adapter/kernel", P("fsdp", "tensor")),
    *((rf"(c_former/)?{pattern}", spec) for pattern, spec in bert.SHARDING),
    (r".*/bias", P()),
)
