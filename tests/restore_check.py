"""Run in a process with 8 virtual devices: a run that starts on 8 devices and goes on on others.

    python tests/restore_check.py FOLDER WHOLE

Trains half of the small stage on 'fsdp' 8 into FOLDER/half, then finishes copies of it. What is
frozen comes from the run in WHOLE.
"""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path
from unittest import mock

import jax
import small_stage

from xllm_jax.core import mesh
from xllm_jax.training import loop

HALF = 3
OTHERS = {
    "four": ({"data": 2, "fsdp": 2}, 4),
    "other_axes": ({"data": 2, "fsdp": 2, "tensor": 2}, 8),
}


def stage(whole, **changes):
    """The small stage with the frozen embedding of a finished run."""
    return small_stage.stage(init={"llm/embedding": str(whole)}, **changes)


def fit(axes, count, workdir, **options):
    """Trains on the first `count` devices."""
    make = functools.partial(mesh.make, devices=jax.devices()[:count])
    with mock.patch.object(mesh, "make", make):
        loop.fit(stage(sys.argv[2], mesh=axes), workdir, **options)


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    folder = Path(sys.argv[1])
    fit({"fsdp": 8}, 8, folder / "half", stop_after=HALF)
    for name, (axes, count) in OTHERS.items():
        shutil.copytree(folder / "half", folder / name)
        fit(axes, count, folder / name)


if __name__ == "__main__":
    sys.exit(main())
