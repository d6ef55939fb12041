"""Mistakes on the command line of training: one line that names the mend, exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/stage2_image.py:tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/stage2_imag.py"], ["Did you mean configs/stage2_image.py?"]),
        (["--config=configs/stage2_image.py:small"], ["'small'", "real or tiny"]),
        ([CONFIG, "--config.optimizer.peek=1"], ["--config.optimizer.peek", "Did you mean peak?"]),
        ([CONFIG, "--config.data.mix.captons=0"], ["captons", "captions"]),
        ([CONFIG, "--config.steps=many"], ["--config.steps", "many"]),
        ([CONFIG, "--config.steps.more=1"], ["--config.steps.more"]),
        ([CONFIG, "--wrkdir=x"], ["--wrkdir", "Did you mean --workdir?"]),
        ([CONFIG, "more"], ["unexpected argument 'more'"]),
        ([CONFIG], ["--workdir", "required"]),
        (["--workdir=x"], ["--config", "required"]),
    ],
)
def test_a_mistake_is_one_line(arguments, words, tmp_path):
    workdir = [] if "required" in words else [f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "launch/train.py", *arguments, *workdir],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and done.stdout == "", done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert not (tmp_path / "run").exists()
