"""JSON that others wrote: whatever is wrong with it is told in one line."""

from __future__ import annotations

import json
from typing import Any

from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError

MOST_SIGNS = 3 << 22  # that make values: 64 MB of "{}," would take 1.6 GB of memory


def parsed(text: str, where: str) -> Any:
    """The value of a JSON text.

    Args:
      text: the whole of it.
      where: place for messages.

    Raises:
      UserError: broken JSON, too many values, a number of thousands of digits, or nesting of a
        thousand levels.
    """
    if sum(map(text.count, bounded.SIGNS)) > MOST_SIGNS:
        hint = "Cut it into several"
        raise UserError(f"has more than {MOST_SIGNS:,} values", field=where, hint=hint)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        what = f"broken JSON at line {error.lineno}, column {error.colno}: {error.msg}"
    except RecursionError:
        what = "broken JSON: is nested too deeply"
    except ValueError:  # Python reads no number of more than 4300 digits
        what = "broken JSON: holds a number of too many digits"
    raise UserError(what, field=where)
