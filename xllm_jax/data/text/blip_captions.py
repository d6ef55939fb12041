"""Captions and questions as BLIP-2's text processors make them (`blip_processors.py`)."""

from __future__ import annotations

import re

PUNCTUATION = r"[.!\"()*#:;~]"
MOST_WORDS = 50


def caption(text: str, most_words: int = MOST_WORDS) -> str:
    """Lower case, some punctuation and runs of spaces to one space, at most `most_words` words."""
    text = re.sub(PUNCTUATION, " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return _cut(text, most_words)


def question(text: str, most_words: int = MOST_WORDS) -> str:
    """Lower case, some punctuation removed, at most `most_words` words; inner spaces stay."""
    return _cut(re.sub(PUNCTUATION, "", text.lower()).rstrip(" "), most_words)


def _cut(text: str, most_words: int) -> str:
    words = text.split(" ")
    return " ".join(words[:most_words]) if len(words) > most_words else text
