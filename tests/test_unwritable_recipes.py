"""A full disk in the middle of a recipe: one line, exit code 74, and nothing half written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked
import pytest
from restricted import restricted
from test_killed_recipes import pairs
from test_unwritable import ENVIRONMENT

from xllm_jax.core.errors import UNWRITABLE

RECIPES = {
    "translated": ("--reader=coco", "--input=coco", "--translations=table.json"),
    "similar": ("--reader=coco", "--input=coco", "--scores=scores.npy"),
    "questions": ("--reader=coco", "--input=coco"),
    "instructions": ("--input=.", "--sources=sources.json", "--counts=talks=8"),
    "resampled": ("--input=sounds",),
    "resampled by two": ("--input=sounds", "--workers=2"),
}


def build(folder: Path, case: str, *extra: str, limit: int = 0) -> tuple[int, list[str]]:
    """(exit code, lines but those of progress) of a recipe."""
    command = (sys.executable, "-m", "xllm_jax.launch.commands", "build-data")
    done = forked.run(
        [*(restricted(limit) if limit else ()), *command, f"--recipe={case.split()[0]}"]
        + [*RECIPES[case], *extra],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.replace("\r", "\n").splitlines()
    silent = ("it/s", "items/s", "INFO:__main__:", "apitools not found")
    kept = [one for one in lines if one.strip() and not any(word in one for word in silent)]
    return done.returncode, kept


@pytest.mark.parametrize("case", RECIPES)
def test_a_full_disk_is_one_line(case, tmp_path):
    """No file may get larger than 100 bytes."""
    pairs(tmp_path)
    about = {"talks": {"reader": "coco", "path": "coco"}}
    (tmp_path / "sources.json").write_text(json.dumps(about))
    code, lines = build(tmp_path, case, "--output=out", limit=100)
    assert code == UNWRITABLE, lines
    assert len(lines) == 1 and "cannot be written (File too large)" in lines[0], lines
    assert not [file for file in (tmp_path / "out").rglob("*") if ".partial" in file.name]


@pytest.mark.parametrize("case", ["translated", "similar", "questions", "resampled"])
def test_a_folder_that_nobody_may_write_to_is_one_line(case, tmp_path):
    pairs(tmp_path)
    code, lines = build(tmp_path, case, "--output=/sys/kernel/x")
    assert code == UNWRITABLE, lines
    assert len(lines) == 1 and lines[0].startswith("/sys/kernel/x"), lines
    assert "cannot be written (" in lines[0]
