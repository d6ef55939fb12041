"""Padding waste: the share of a batch's places that hold nothing, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

from xllm_jax.core.stage import Data
from xllm_jax.data.media import modalities

ENOUGH = 20  # batches that are looked at before a run is warned
MOST = 0.2  # share of the places that may be empty without a word
HINTS = {
    "tokens": "lower data.length, or raise data.examples or lower data.rows to pack more per row",
    "answers": "lower data.answers",
    "characters": "lower data.characters_length",
    "word pieces": "lower data.text_length",
}

Places = Mapping[str, tuple[int, int]]  # {what: (used, capacity)}


def hints(data: Data) -> dict[str, str]:
    """{kind of place: what to do where most of them are empty}.

    Raises:
      UserError: `data.modalities` names a record that does not exist.
    """
    return HINTS | {
        name: found.padding or f"lower data.items.{name}, or raise data.examples"
        for name, found in modalities.named(data.modalities).items()
    }


class Waste:
    """Adds up how much of every kind of place is used, and hints at what to do, see `hints`."""

    def __init__(self, hints: Mapping[str, str] = HINTS) -> None:
        self.hints = hints
        self.used: dict[str, int] = {}
        self.capacity: dict[str, int] = {}
        self.batches = 0

    def add(self, places: Places) -> None:
        """Counts one batch."""
        self.batches += 1
        for name, (used, capacity) in places.items():
            self.used[name] = self.used.get(name, 0) + used
            self.capacity[name] = self.capacity.get(name, 0) + capacity

    def shares(self) -> dict[str, float]:
        """{what: share of its places that are empty}; kinds without places are left out."""
        return {name: 1 - self.used[name] / most for name, most in self.capacity.items() if most}

    def warning(self, most: float = MOST) -> str:
        """What is wasted and the hint in words, '' where every share is at most `most`."""
        told = [
            f"{share:.0%} of the places for {name} are padding: {hint}"
            for name, share in self.shares().items()
            for hint in [self.hints.get(name, "see the shapes")]
            if share > most
        ]
        return f"Padding waste over {self.batches} batches. {'; '.join(told)}." if told else ""


class Watch:
    """Tells a run once, early, that it computes padding."""

    def __init__(self, enough: int = ENOUGH, hints: Mapping[str, str] = HINTS):
        self._enough, self._waste = enough, Waste(hints)

    def add(self, places: Places) -> str:
        """Counts a batch; the warning when enough have been seen, '' before and ever after."""
        if self._waste.batches >= self._enough:
            return ""
        self._waste.add(places)
        return self._waste.warning() if self._waste.batches == self._enough else ""
