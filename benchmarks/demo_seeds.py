"""Runs the demo with several seeds and writes its table into README.md and docs/demo.md.

PYTHONPATH=. python benchmarks/demo_seeds.py --output=seeds [--seeds=5] [--first=1]

What is finished is kept: the same command goes on where it stopped, and runs of other seeds that
were recorded of the same code stay in the table. It stands between marks that carry the hash of
`demo_behavior.py`; `tests/test_demo_seeds.py` fails when it is no longer the hash of the code.
`xllm_jax/report/recorded.json` keeps the runs, so that `make demo` can say where its own lies. The
hash is taken before and after the runs, and nothing is written when they differ.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import demo_behavior
import jax

from xllm_jax.core import atomic, fingerprint
from xllm_jax.launch import commands
from xllm_jax.report import spread

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "demo.md")
BEGIN, END = "<!-- demo seeds, code {} -->", "<!-- end of demo seeds -->"
BLOCK = re.compile(r"<!-- demo seeds, code (\w*) -->\n.*?" + re.escape(END), re.DOTALL)


def block(runs: Mapping[str, spread.Values], code: str) -> str:
    """The table with its marks."""
    return f"{BEGIN.format(code)}\n{spread.markdown(runs)}\n{END}"


def stated(page: str) -> list[str]:
    """Hashes of the tables in a page."""
    return [found[1] for found in BLOCK.finditer(page)]


def placed(page: str, made: str) -> str:
    """The page with its table replaced.

    Raises:
      ValueError: the page has no marks, or several.
    """
    changed, count = BLOCK.subn(lambda _: made, page)
    if count != 1:
        raise ValueError(f"{count} tables of seeds in the page, not one")
    return changed


def run(output: Path, seed: int, *more: str) -> dict[str, float]:
    """Runs one seed, or what is left of it; returns its values."""
    command = [sys.executable, "-m", commands.__name__, "demo", f"--output={output}"]
    subprocess.run([*command, f"--seed={seed}", *more], check=True)
    return spread.values(output / f"seed-{seed}" if seed else output)


def merged(
    known: Mapping[str, Any] | None, code: str, runs: Mapping[str, spread.Values]
) -> dict[str, spread.Values]:
    """Runs of this code in the order of their seeds: those recorded before, and these instead.

    Args:
      known: of `spread.recorded`.
      code: the hash.
      runs: {seed: Values}.
    """
    before = known["runs"] if known and known["hash"] == code else {}
    found = {**before, **runs}
    return {seed: found[seed] for seed in sorted(found, key=int)}


def main() -> None:
    """Runs all seeds, then writes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1)
    given = parser.parse_args()
    code = demo_behavior.whole(demo_behavior.behavior())
    seeds = range(given.first, given.first + given.seeds)
    made = {str(seed): run(given.output.absolute(), seed) for seed in seeds}
    if demo_behavior.whole(demo_behavior.behavior()) != code:
        sys.exit("The code has changed meanwhile: nothing was written")
    runs = merged(spread.recorded(), code, made)
    about = {"hash": code, "commit": fingerprint.commit(), "jax": jax.__version__, "runs": runs}
    atomic.write_json(ROOT / "xllm_jax" / "report" / spread.RECORDED, about)
    for page in PAGES:
        atomic.write_text(page, placed(page.read_text("utf-8"), block(runs, code)))
    print(json.dumps(about, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
