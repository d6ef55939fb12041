"""Writes the table of an ablation into docs/llms.md.

    xllm ablation --output=demo --seeds=3
    PYTHONPATH=. python benchmarks/ablation_page.py demo/ablation/ablation.json

The table stands between marks that carry the hash of the LLM's kernels; `tests/test_ablation.py`
fails when it is no longer that of the LLM that ships.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xllm_jax.core import atomic, bounded
from xllm_jax.report import ablation

PAGE = Path(__file__).parents[1] / "docs" / "llms.md"
BEGIN, END = "<!-- ablation, LLM {} -->", "<!-- end of ablation -->"
BLOCK = re.compile(r"<!-- ablation, LLM (\w*) -->\n.*?" + re.escape(END), re.DOTALL)


def stated(page: str) -> list[str]:
    """Hashes of the tables in a page."""
    return [found[1] for found in BLOCK.finditer(page)]


def placed(page: str, results: Mapping[str, Any]) -> str:
    """The page with its table replaced.

    Raises:
      ValueError: the page has no marks, or several.
    """
    made = f"{BEGIN.format(results['llm'])}\n{ablation.markdown(results)}\n{END}"
    changed, count = BLOCK.subn(lambda _: made, page)
    if count != 1:
        raise ValueError(f"{count} tables of an ablation in the page, not one")
    return changed


if __name__ == "__main__":
    atomic.write_text(PAGE, placed(PAGE.read_text("utf-8"), bounded.read_json(Path(sys.argv[1]))))
