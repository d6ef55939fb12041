"""Lines of a text, split where files have them."""

from __future__ import annotations


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends, which are newline characters alone.

    `str.splitlines` also ends a line at U+2028, U+2029, U+0085, form feeds and other characters
    that JSON strings, transcripts, file names and vocabularies hold.

    Args:
      text: with '\\n' or '\\r\\n' between lines, and perhaps behind the last one.
    """
    lines = text.removesuffix("\n").split("\n") if text else []
    return [line.removesuffix("\r") for line in lines]
