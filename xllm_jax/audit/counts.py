"""Sums over many batches: tokens by kind and source, lengths, padding, what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from xllm_jax.audit.samples import Sample
from xllm_jax.data.batching.padding import Waste


class Counts:
    """Adds up what batches hold.

    Attributes:
      examples: {source: examples}.
      tokens: {source: {'tokens', 'supervised', modality: how many}}.
      lengths: {kind: of every example, how many it has}; kinds as in `tokens`.
      waste: of the places of the batches.
      cut: tokens of long text that were left out.
      skipped: {reason: records}.
      batches: how many.
    """

    def __init__(self, hints: Mapping[str, str]) -> None:
        self.examples: Counter[str] = Counter()
        self.tokens: dict[str, Counter[str]] = {}
        self.lengths: dict[str, list[int]] = {}
        self.waste = Waste(hints)
        self.cut = self.batches = 0
        self.skipped: Counter[str] = Counter()

    def add(self, samples: Sequence[Sample], info: Mapping[str, Any]) -> None:
        """Counts one batch."""
        self.batches += 1
        self.cut += info["cut"]
        self.waste.add(info["padding"])
        self.skipped.update(skip.reason for skip in info["skipped"])
        for sample in samples:
            self.examples[sample.source] += 1
            self.tokens.setdefault(sample.source, Counter()).update(sample.tokens)
            for kind, count in sample.tokens.items():
                if count:
                    self.lengths.setdefault(kind, []).append(count)

    def total(self, kind: str) -> int:
        """Tokens of a kind over all sources."""
        return sum(found[kind] for found in self.tokens.values())

    def supervised_share(self, source: str | None = None) -> float:
        """Share of the tokens that are supervised, of one source or of all."""
        chosen = [self.tokens[source]] if source else list(self.tokens.values())
        whole = sum(found["tokens"] for found in chosen)
        return sum(found["supervised"] for found in chosen) / max(whole, 1)
