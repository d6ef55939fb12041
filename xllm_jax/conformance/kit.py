"""All checks of one network."""

from __future__ import annotations

from collections.abc import Collection

from xllm_jax.conformance import llm, media, outcome, parameters, subject
from xllm_jax.conformance.outcome import Result
from xllm_jax.conformance.subject import LLM, Subject
from xllm_jax.core.errors import UserError


def checks_of(role: str) -> dict[str, outcome.Check]:
    """{name: check} of a role, in the order of the table."""
    return (llm.CHECKS if role == LLM else media.CHECKS) | parameters.CHECKS


def check(tested: Subject, only: Collection[str] = ()) -> tuple[str, list[Result]]:
    """Checks a network.

    Args:
      tested: the network.
      only: names of checks; empty = all.

    Returns:
      (its role, a result a check).

    Raises:
      UserError: the network cannot be built or is of no role, or there is no such check.
    """
    role = subject.role(tested.network())
    checks = checks_of(role)
    for name in only:
        if name not in checks:
            raise UserError(f"no check {name!r}", hint=f"Choices: {', '.join(checks)}")
    chosen = {name: one for name, one in checks.items() if not only or name in only}
    try:
        bench = (llm.LLMBench if role == LLM else media.MediaBench)(tested)
    except UserError:
        raise
    except Exception as error:  # whatever a new network does
        told = " ".join(str(error).split())[:300]
        why = f"the network does not run: {type(error).__name__}: {told}"
        return role, [Result(name, outcome.FAILED, why) for name in chosen]
    return role, outcome.run(chosen, bench)
