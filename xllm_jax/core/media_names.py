"""What media are called that no file holds."""

from __future__ import annotations


def captions_of(modality: str) -> str:
    """How captions of what answers stand for are called among the media that a cache holds."""
    return f"{modality}_captions"
