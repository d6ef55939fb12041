"""What media are called that no file holds."""

from __future__ import annotations

# Prefixes of media that are written out instead of shown: as pieces of words, or each character by
# itself, as the speech interface gives them.
WRITTEN, SPELLED = "text:", "spelled:"


def is_written(name: str) -> bool:
    """Whether a medium of this name is its own text, and no file's path."""
    return name.startswith((WRITTEN, SPELLED))


def captions_of(modality: str) -> str:
    """How captions of what answers stand for are called among the media that a cache holds."""
    return f"{modality}_captions"
