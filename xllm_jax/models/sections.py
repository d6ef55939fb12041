"""Sections: where a network can be cut, so that what is frozen below a cut need not run every time.

A network whose work can be parted names the parameters of its sections in `SECTIONS`, one tuple of
top-level names per section in order, and its `__call__` takes `sections=(first, end)`: every
section maps (x, lengths) to (x, lengths). A network without SECTIONS is one section.
"""

from __future__ import annotations

import dataclasses

from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Section:
    """One section on the way from a medium to its embeddings.

    Attributes:
      part: of the model.
      number: among the part's sections.
      names: its parameters, by their first name below the part; None for all of them.
    """

    part: str
    number: int = 0
    names: tuple[str, ...] | None = None

    def owns(self, path: str) -> bool:
        """Whether a parameter belongs to this section, by its path from the model's root."""
        part, _, rest = path.partition("/")
        return part == self.part and (self.names is None or rest.split("/")[0] in self.names)

    def __str__(self) -> str:
        names = [] if self.names is None else [self.names[-1]]
        return "/".join([self.part, *names])


def parted(network: nn.Module) -> bool:
    """Whether the network can be cut inside."""
    return hasattr(network, "SECTIONS")


def sections_of(part: str, network: nn.Module) -> tuple[Section, ...]:
    """The sections of one part."""
    if not parted(network):
        return (Section(part),)
    return tuple(Section(part, number, names) for number, names in enumerate(network.SECTIONS))
