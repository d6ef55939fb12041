"""kill -9 amid the writes of a recipe: the same command leaves the same files as without it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reader_fixtures as fixtures
import small_stage

from xllm_jax.core import atomic

COUNT = 12
TEXTS = [f"a red circle number {number} stands here" for number in range(1, COUNT + 1)]


def pairs(root: Path) -> str:
    """Captioned images in COCO's form, a table of translations and a list of scores."""
    folder = root / "coco"
    if folder.exists():
        return str(folder)
    numbers = range(1, COUNT + 1)
    data = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in numbers],
        "annotations": [{"image_id": n, "caption": text} for n, text in zip(numbers, TEXTS)],
    }
    fixtures.write(folder / "annotations/captions_train2017.json", data)
    fixtures.pictures(folder / "train2017", *(f"{n}.jpg" for n in numbers))
    table = {text: f"第{n}个红色的圆在这里" for n, text in zip(numbers, TEXTS)}
    fixtures.write(root / "table.json", table)
    np.save(root / "scores.npy", np.linspace(0, 1, COUNT).astype(np.float32))
    for number in numbers:
        fixtures.sound(root / f"sounds/{number % 3}/{number}.wav")
    return str(folder)


def translated(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import translated

    table = str(root / "table.json")
    translated.build(pairs(root), str(output), "coco", translations=table)


def similar(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import similar

    similar.build(pairs(root), str(output), "coco", scores=str(root / "scores.npy"))


def questions(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import questions

    questions.build(pairs(root), str(output), reader="coco")


def resampled(root: Path, output: Path) -> None:
    from xllm_jax.prepare.recipes import resampled

    pairs(root)
    resampled.build(str(root / "sounds"), str(output))


def instructions(root: Path, output: Path) -> None:
    from xllm_jax.core.stage import Source
    from xllm_jax.prepare.recipes import instructions

    sources = {"talks": Source("coco", pairs(root))}
    instructions.build(str(output), sources, counts={"talks": 8})


def world(_: Path, output: Path) -> None:
    from xllm_jax.data.synthetic_world import build, plan

    sizes = {field.name: 2 for field in dataclasses.fields(plan.WorldSizes)}
    build.build(output / "world", plan.WorldSizes(**sizes), workers=0)


def tokenizer(_: Path, output: Path) -> None:
    """What `build-backbones --tokenizer` learns."""
    from xllm_jax.data.text import chatglm_tokenizer

    chatglm_tokenizer.train_tokenizer(TEXTS, output, learned=20, longest=2, words=[])


CASES = {
    function.__name__: function
    for function in (translated, similar, questions, resampled, instructions, world, tokenizer)
}


@pytest.mark.parametrize("case", CASES)
def test_a_killed_recipe_continues_to_the_same_files(case, tmp_path):
    command = (sys.executable, str(Path(__file__).with_name("kill_midway.py")), case)
    paths = [str(small_stage.ROOT), str(Path(__file__).parent)]
    done = subprocess.run(
        [*command, str(tmp_path), os.environ.get("XLLM_KILLS", "2"), "7"],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["writes"] and found["tried"]


def test_what_another_run_writes_at_the_same_time_stays(tmp_path):
    """The train split was killed amid its table; a run of another split is amid its own."""
    (tmp_path / "output").mkdir()
    killed = atomic.partial_name(tmp_path / "output/train.jsonl")
    killed.write_text("half")
    translated(tmp_path, tmp_path / "output")
    assert not killed.exists() and (tmp_path / "output/train.jsonl").is_file()
    others = [atomic.partial_name(tmp_path / "output" / name) for name in ("val.jsonl", "val.npy")]
    again = atomic.partial_name(tmp_path / "output/val_translated.json")
    (tmp_path / "output/val_translated.json").write_text("{}")
    for file in (*others, again):
        file.write_text("half")
        os.utime(file, ns=(time.time_ns() + 10**9,) * 2)
    translated(tmp_path, tmp_path / "output")
    assert all(file.exists() for file in (*others, again))
