"""EvalScope's command with one filter more: an answer becomes its characters, divided by spaces.

    python integrations/evalscope/run.py eval --datasets vqav2 msr_vtt fleurs …

EvalScope compares captions word by word, and a word is what spaces divide: without the filter a
Chinese sentence is one word. Runs in EvalScope's environment and needs nothing of X-LLM.
"""

from __future__ import annotations

import unicodedata

from evalscope.api.filter import Filter
from evalscope.api.registry import register_filter
from evalscope.cli.cli import run_cmd


def characters(text: str) -> str:
    """Letters, digits and characters of a text in NFKC and lower case, divided by spaces."""
    return " ".join(sign for sign in unicodedata.normalize("NFKC", text).lower() if sign.isalnum())


@register_filter("characters")
class Characters(Filter):
    """The filter."""

    def apply(self, instance: list[str]) -> list[str]:
        """Each answer as its characters."""
        return [characters(text) for text in instance]


if __name__ == "__main__":
    run_cmd()
