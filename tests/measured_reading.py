"""What reading media takes: a process reads them in turn and tells of each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SCRIPT = """
import resource, sys
from xllm_jax.core.errors import UserError
from xllm_jax.data.media import modalities
import av, numpy, scipy.fft, soundfile, soxr, PIL.Image
found = modalities.stored()[sys.argv[1]]
for path in sys.argv[2:]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    try:
        found.read(path)
        told = "read"
    except UserError as error:
        told = " ".join(str(error).split())
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(after.ru_maxrss - before.ru_maxrss, seconds, told, flush=True)
"""


class Taken(NamedTuple):
    """By one file: megabytes beyond the largest before, seconds of the processor, the outcome."""

    megabytes: float
    seconds: float
    told: str


def read(modality: str, paths: Sequence[Path]) -> dict[str, Taken]:
    """{name of the file: what reading it took}; other words of the process fail."""
    command = [sys.executable, "-c", SCRIPT, modality, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    taken = [Taken(int(kilobytes) / 1024, float(spent), told) for kilobytes, spent, told in lines]
    assert len(taken) == len(paths), done.stdout
    return {path.name: one for path, one in zip(paths, taken)}
