"""The whole of X-LLM: media become embeddings that the LLM reads like words (paper, section 3).

Nothing here knows a modality. An `XLLM` composes networks by name, and its parameters are one dict
{part name: parameters of that part}, so that parameter paths read `image_interface/...`, `llm/...`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast, overload

import jax
import jax.numpy as jnp
from flax import linen as nn

from xllm_jax.core import mesh
from xllm_jax.core.batch import ConversationBatch, Media
from xllm_jax.core.errors import UserError
from xllm_jax.core.media_names import captions_of
from xllm_jax.core.types import Params
from xllm_jax.models import lora
from xllm_jax.models.decoder_cache import Cache
from xllm_jax.models.outputs.projection import LAST
from xllm_jax.models.sections import Section, parted, sections_of

Array = jax.Array

LLM = "llm"
LLM_PREFIX = "llm_prefix"  # a learned prefix of the LLM, read by generation alone
LLM_STREAM = 1 << 16  # of random numbers, beyond those of media
SIGNALS = "signal_tokens"  # rows of the LLM's tables that stand beside it


class Readings(NamedTuple):
    """What a projection reads at the signal runs of a batch.

    Attributes:
      states: `[B, K, S, D]`, of the layers that it names; S positions of a row, run by run.
      embeddings: `[B, S, D]`, what the LLM reads there.
    """

    states: Array
    embeddings: Array


class BoundLLM(Protocol):
    """An LLM with its parameters; `models/glm.py` says what its methods take and give."""

    @overload
    def __call__(
        self,
        rows: int,
        length: int,
        /,
        *,
        prefix: Array | None = None,
        method: Literal["init_cache"],
    ) -> Cache: ...
    @overload
    def __call__(self, given: Array, /, *, method: Literal["embed", "logits"]) -> Array: ...
    @overload
    def __call__(
        self,
        x: Array,
        segments: Array,
        context: Array,
        positions: Array,
        cache: Cache | None = None,
        /,
        **options: Any,
    ) -> tuple[Array, Cache, *tuple[Array, ...]]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class XLLM:
    """Networks and how they are joined; a pure description, parameters come with every call.

    Attributes:
      networks: {part: network}. Encoders are called `(values, lengths, train) -> (features,
        lengths)`, interfaces `(features, lengths, counts, train) -> (embeddings, counts)`; the part
        'llm' has the four methods of `models/glm.py`. Stage 1 may hold other parts.
      modalities: (modality, encoder part, interface part) in any number; modalities may share an
        encoder.
      outputs: (modality, projection part, text encoder part or '') of answers beside text.
      spans: {modality of an output: positions of a run of its signal tokens}.
      denoisers: {modality of an output: (UNet part, autoencoder part)}, for a denoising loss.
      frozen: {modality: how many of its first sections (`chain`) nothing trains in}. They run as in
        evaluation, and no gradient reaches them. A modality without an entry has a frozen encoder.
      cached: {modality: how many of its first sections are done}: batches hold their outputs.
      given: those of `cached` that the media files themselves hold, with or without a cache.
    """

    networks: Mapping[str, nn.Module]
    modalities: tuple[tuple[str, str, str], ...] = ()
    outputs: tuple[tuple[str, str, str], ...] = ()
    spans: Mapping[str, int] = dataclasses.field(default_factory=dict)
    denoisers: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    frozen: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cached: Mapping[str, int] = dataclasses.field(default_factory=dict)
    given: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def apply(self, params: Params, part: str, *inputs: Any, **options: Any) -> Any:
        """What one network makes of its inputs.

        Args:
          params: {part: parameters}.
          part: its name.
          inputs, options: of `nn.Module.apply`.
        """
        return self.networks[part].apply({"params": params[part]}, *inputs, **options)

    def parts(self, modality: str) -> tuple[str, str]:
        """(encoder part, interface part) of a modality.

        Raises:
          UserError: the model has no such modality.
        """
        for name, encoder, interface in self.modalities:
            if name == modality:
                return encoder, interface
        known = ", ".join(row[0] for row in self.modalities) or "none"
        raise UserError(f"unknown modality {modality!r}", field="media", hint=f"Known: {known}")

    def chain(self, modality: str) -> tuple[Section, ...]:
        """The sections from a medium's values to its embeddings, in order.

        Of the captions of an output: from their ids to what its text encoder makes of them.
        """
        if modality in self.encoders:
            part = self.encoders[modality]
            return sections_of(part, self.networks[part])
        return tuple(
            s for part in self.parts(modality) for s in sections_of(part, self.networks[part])
        )

    @functools.cached_property
    def encoders(self) -> dict[str, str]:
        """{captions of an output, by their name: its text encoder's part}."""
        return {captions_of(name): part for name, _, part in self.outputs if part}

    @functools.cached_property
    def encoded(self) -> XLLM:
        """The same networks for batches whose media are finished embeddings, `[B, M, n, D]`."""
        done = {name: len(self.chain(name)) for name, _, _ in self.modalities}
        return dataclasses.replace(self, cached=done)

    def encode(
        self,
        params: Params,
        modality: str,
        media: Media,
        train: bool = False,
        key: Array | None = None,
    ) -> tuple[Array, Array]:
        """Media items to LLM embeddings, through the encoder and the interface.

        Args:
          params: {part: parameters}.
          modality: name of the modality.
          media: B rows of M items; every item is encoded by itself (a video is M frames).
          train, key: dropout and its key.

        Returns:
          (embeddings `[B, M * n, D]`, items in order, n embeddings each; the number of valid ones
          of each item `[B, M]` int32).
        """
        rows, items = media.values.shape[:2]
        x, lengths = _merge_items(media.values), _merge_items(media.lengths)
        counts = None if media.counts is None else _merge_items(media.counts)
        done = self.cached.get(modality, 0)
        frozen = max(done, self.frozen.get(modality, len(sections_of("", self._encoder(modality)))))
        x, lengths = self.run_sections(params, modality, slice(done, frozen), x, lengths, counts)
        x = jax.lax.stop_gradient(x) if frozen else x
        rest = slice(frozen, None)
        x, lengths = self.run_sections(params, modality, rest, x, lengths, counts, train, key)
        x = mesh.constrain_rows(x.reshape(rows, -1, x.shape[-1]))
        return x, lengths.reshape(rows, items)

    def _encoder(self, modality: str) -> nn.Module:
        return self.networks[self.parts(modality)[0]]

    def run_sections(
        self,
        params: Params,
        modality: str,
        which: slice,
        x: Array,
        lengths: Array,
        counts: Array | None,
        train: bool = False,
        key: Array | None = None,
    ) -> tuple[Array, Array]:
        """Some neighboring sections of a modality's chain.

        Args:
          params, modality, train, key: as in `encode`.
          which: of the chain.
          x: `[N, ...]`, the items' values, or what the section before gave.
          lengths, counts: `[N]`, valid entries of `x`, and embeddings wanted (or None).

        Returns:
          (what the last of them gives `[N, n, width]`, its valid entries `[N]` int32).
        """
        encoder, _ = self.parts(modality)
        sections = self.chain(modality)[which]
        for part, group in itertools.groupby(sections, key=lambda section: section.part):
            numbers = [section.number for section in group]
            network, first = self.networks[part], part == encoder
            given = (x, lengths) if first else (x, lengths, counts)
            options = {"sections": (numbers[0], numbers[-1] + 1)} if parted(network) else {}
            x, lengths = self.apply(
                params,
                part,
                *given,
                train=train,
                rngs=_dropout(key, 0 if first else 1),
                **options,
            )
        return x, lengths

    def unread(self) -> tuple[Section, ...]:
        """Steps whose parameters nobody reads, since all of their outputs come cached."""
        done, asked = [], []
        for modality in (*(name for name, *_ in self.modalities), *self.encoders):
            sections, count = self.chain(modality), self.cached.get(modality, 0)
            done += sections[:count]
            asked += sections[count:]
        return tuple(dict.fromkeys(section for section in done if section not in asked))

    def embed(
        self,
        params: Params,
        batch: ConversationBatch,
        train: bool = False,
        key: Array | None = None,
    ) -> Array:
        """Word embeddings of the batch with the media in their places, `[B, T, D]`.

        Args:
          params: {part: parameters}.
          batch: ids and media.
          train, key: dropout and its key.
        """
        x = self.llm(params)(batch.ids, method="embed")
        for number, (modality, media) in enumerate(sorted(batch.media.items())):
            if media.values.shape[1]:
                part_key = None if key is None else jax.random.fold_in(key, number)
                embeddings, _ = self.encode(params, modality, media, train, part_key)
                x = splice(x, embeddings, media.index)
        return x

    def llm(self, params: Params) -> BoundLLM:
        """The LLM with its signal tokens, called as its `apply` is, without the parameters."""
        own = cast(BoundLLM, functools.partial(self.networks[LLM].apply, {"params": params[LLM]}))
        if SIGNALS not in self.networks:
            return own

        def call(*inputs: Any, method: str | None = None, **options: Any) -> Any:
            made = own(*inputs, method=method, **options)
            if method == "embed":
                return self.apply(params, SIGNALS, made, *inputs)
            if method == "logits":
                return self.apply(params, SIGNALS, made, *inputs, method="logits")
            return made

        return call

    def hidden(
        self,
        params: Params,
        batch: ConversationBatch,
        train: bool = False,
        key: Array | None = None,
    ) -> Array:
        """Final states of the LLM, `[B, T, D]`, the input of `logits`.

        Args:
          params: {part: parameters}.
          batch: ids, media, segments, context and positions.
          train, key: dropout and its key.
        """
        return self.read(params, batch, {}, train, key)[0]

    def read(
        self,
        params: Params,
        batch: ConversationBatch,
        places: Mapping[str, Array],
        train: bool = False,
        key: Array | None = None,
        prefix: bool = False,
    ) -> tuple[Array, dict[str, Readings]]:
        """Final states of the LLM, and what projections read at some places.

        Args:
          params, batch, train, key: as in `hidden`.
          places: {modality of an output: `[B, S]` int32, positions of signal tokens}.
          prefix: put the learned prefix first, where there is one, as generation does.

        Returns:
          (`[B, T, D]`, {modality: readings}).
        """
        x = self.embed(params, batch, train, key)
        layout, llm = (batch.segments, batch.context, batch.positions), self.llm(params)
        drops = train and key is not None and lora.drops(params[LLM])
        rngs = {"rngs": _dropout(key, LLM_STREAM)} if drops else {}
        inner = {name: self.llm_layers(name) for name in sorted(places)}
        deep = any(layer != LAST for layers in inner.values() for layer in layers)
        watched = jnp.concatenate([places[name] for name in inner], axis=1) if deep else None
        start = self.prefix(params) if prefix else None
        cache = None if start is None else llm(*x.shape[:2], prefix=start, method="init_cache")
        watch = {"watched": watched} if deep else {}
        states, _, *seen = llm(x, *layout, cache, **watch, **rngs)
        found, place = {}, 0
        for name, layers in inner.items():
            at = slice(place, place + places[name].shape[1])
            final = rows_at(states, places[name])
            taken = [final if n == LAST else seen[0][n, :, at] for n in layers]
            found[name] = Readings(jnp.stack(taken, axis=1), rows_at(x, places[name]))
            place = at.stop
        return states, found

    def llm_layers(self, modality: str) -> tuple[int, ...]:
        """Layers of the LLM that an output's projection reads: LAST, or 0 and what follows."""
        depth = self.networks[LLM].depth
        asked = self.networks[self.output(modality)[0]].llm_layers
        return tuple(LAST if n in (LAST, depth) else n % (depth + 1) for n in asked)

    def output(self, modality: str) -> tuple[str, str]:
        """(projection part, text encoder part or '') of a modality that answers may be in.

        Raises:
          UserError: answers are not in this modality.
        """
        for name, projection, encoder in self.outputs:
            if name == modality:
                return projection, encoder
        known = ", ".join(row[0] for row in self.outputs) or "none"
        what = f"answers are not in the modality {modality!r}"
        raise UserError(what, field="outputs", hint=f"Known: {known}")

    def project(self, params: Params, modality: str, found: Readings, count: int) -> Array:
        """Embeddings of the captions that runs of signal tokens stand for.

        Args:
          params: {part: parameters}.
          modality: of the output.
          found: of `read`, at runs of `count` tokens, one behind the other.
          count: n, tokens of a run.

        Returns:
          `[B, S / n, q, width]` float32.
        """
        rows, layers, places, width = found.states.shape
        runs = places // count
        states = found.states.reshape(rows, layers, runs, count, width).swapaxes(1, 2)
        embeddings = found.embeddings.reshape(rows * runs, count, width)
        merged = _merge_items(states)
        made = self.apply(params, self.output(modality)[0], merged, embeddings)
        return mesh.constrain_rows(made.reshape(rows, runs, *made.shape[1:]))

    def prefix(self, params: Params) -> Array | None:
        """Keys and values to put before every prompt (`models/glm_prefix.py`), where there are."""
        return self.apply(params, LLM_PREFIX) if LLM_PREFIX in self.networks else None

    def logits(self, params: Params, states: Array) -> Array:
        """Scores of the next token: `[..., D]` to `[..., V]` float32."""
        return self.llm(params)(states, method="logits")


def rows_at(x: Array, places: Array) -> Array:
    """`[B, S, D]`, what stands at `places` `[B, S]` of `[B, T, D]`."""
    return mesh.constrain_rows(jnp.take_along_axis(x, places[..., None], axis=1))


def splice(words: Array, embeddings: Array, index: Array) -> Array:
    """Puts media embeddings into their places.

    Args:
      words: `[B, T, D]`.
      embeddings: `[B, N, D]` of the same rows.
      index: `[B, T]` int32, -1 keeps the word, else which embedding stands there.
    """
    picked = jnp.take_along_axis(embeddings, jnp.maximum(index, 0)[..., None], axis=1)
    return mesh.constrain_rows(jnp.where(index[..., None] >= 0, picked.astype(words.dtype), words))


def _merge_items(x: Array) -> Array:
    """`[B, M, ...]` to `[B * M, ...]`."""
    return mesh.constrain_rows(x.reshape(-1, *x.shape[2:]))


def _dropout(key: Array | None, stream: int) -> dict[str, Array] | None:
    return None if key is None else {"dropout": jax.random.fold_in(key, stream)}
