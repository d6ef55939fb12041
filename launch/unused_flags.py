"""Flags that change nothing in a call are refused: who types them expects something of them."""

from __future__ import annotations

from absl import flags

from xllm_jax.core.errors import UserError


def refuse(why: str, hint: str, *names: str) -> None:
    """Refuses flags that change nothing in this call.

    Args:
      why: they do not, such as 'without --draw'.
      hint: what would give them an effect.
      names: of the flags.

    Raises:
      UserError: one of them was given.
    """
    given = next((name for name in names if flags.FLAGS[name].present), None)
    if given:
        raise UserError(f"has no effect {why}", field=f"--{given}", hint=hint)
