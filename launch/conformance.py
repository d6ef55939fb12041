r"""Checks that a network keeps what training, packing, sharding, conversion and decoding rely on.

    xllm conformance llm
    xllm conformance my_package.encoder:network [--checks=masks,padding]

NETWORK is a packaged network (its miniature), file.Class under xllm_jax/models, or module:NAME of
your own: a network class with a row 'tiny' in its file's SIZES, or a function that returns a
`Subject` (xllm_jax/conformance/subject.py). Several can be named. Prints a line for each check:
passed, failed with what and where, or not applicable with the reason. Runs on 8 virtual CPU
devices. Exit code 1 when a check failed.
"""

from __future__ import annotations

import os
import sys

from absl import flags

from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli

CHECKS = flags.DEFINE_list("checks", [], "Names of the checks to run; all by default.")
FAILED = 1


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    import jax  # takes seconds, which a mistake need not wait for

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from xllm_jax.conformance import kit, outcome, packaged, subject

    known = packaged.subjects()
    if not argv[1:]:
        hint = f"Packaged: {', '.join(known)}; or module:function of your own"
        raise UserError("is missing", field="NETWORK", hint=hint)
    sys.path.insert(0, os.getcwd())  # where a module of the user's own lies
    failures = 0
    for name in argv[1:]:
        role, results = kit.check(subject.find(name, known), CHECKS.value)
        print(outcome.table(name, role, results), flush=True)
        failures += sum(one.outcome == outcome.FAILED for one in results)
    return FAILED if failures else 0


if __name__ == "__main__":
    cli.run(main, arguments=True)
