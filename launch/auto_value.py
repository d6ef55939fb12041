"""`auto` for the rows of a stage's micro-batch on the command line: a word where numbers stand.

A stage is data, and its rows are a number. So the word becomes a flag of its own, which commands
have that can choose the number (`auto_rows.py`); others say what to do instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags

from xllm_jax.core.errors import UserError

FLAG = "auto_rows"
ROWS = "data.rows"


def take(argv: Sequence[str], configs: dict[str, Any]) -> list[str]:
    """The command line with `--auto_rows` for `--config.data.rows=auto`.

    Of several values of the rows the last one holds, as for every field; what was given before
    `auto` is no part of the stage then.

    Args:
      argv: the command line.
      configs: {configuration flag: its configuration, before any override}.

    Raises:
      UserError: this command chooses no rows.
    """
    given = [token for token in argv if _field(token) in {f"{name}.{ROWS}" for name in configs}]
    automatic = [token for token in given if token.partition("=")[2] == "auto"]
    if not automatic:
        return list(argv)
    if FLAG not in flags.FLAGS:
        hint = "`xllm train` chooses them, and `xllm preflight --write=flags.txt` for a slice"
        field = automatic[0].partition("=")[0]
        raise UserError("this command takes a number of rows", field=field, hint=hint)
    chosen = given[-1] in automatic
    dropped = given if chosen else automatic
    return [token for token in argv if token not in dropped] + [f"--{FLAG}"] * chosen


def _field(token: str) -> str:
    return token.lstrip("-").partition("=")[0] if token.startswith("-") else ""
