"""A full disk amid reports, caches, similarities, pictures and prepared sets: one line, 74."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import numpy as np
import pytest
import small_cache
import small_clip
from restricted import restricted
from test_killed_recipes import pairs
from test_unwritable import ENVIRONMENT

from xllm_jax import report
from xllm_jax.convert import run_import
from xllm_jax.core import atomic
from xllm_jax.core.errors import UNWRITABLE, CannotWrite
from xllm_jax.data.rows import tar_index, verified
from xllm_jax.data.text.chatglm_tokenizer import train_tokenizer
from xllm_jax.feature_cache import cache_plan, write
from xllm_jax.inference.replies import Picture
from xllm_jax.launch import chat, drawing
from xllm_jax.prepare.recipes import similar


@contextlib.contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file may get larger than `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def half_written(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if ".partial" in file.name]


@pytest.mark.parametrize("file", ["report.json", "report.txt", "report.html"])
def test_a_report_is_old_or_new(file, tmp_path):
    results = {"settings": {"runs": "x" * 30}, "timings": {"world": 3.0}}
    report.write(results, tmp_path)
    before = {one.name: one.read_bytes() for one in tmp_path.iterdir()}
    larger = results | {"timings": {"a step with a longer name": 4.0}}
    with full_at(len(before[file]) - 1), pytest.raises(CannotWrite) as caught:
        report.write(larger, tmp_path)
    assert "cannot be written (File too large)" in str(caught.value)
    assert not half_written(tmp_path)
    report.write(larger, tmp_path / "whole")
    for name, content in before.items():
        found = (tmp_path / name).read_bytes()
        assert found in (content, (tmp_path / "whole" / name).read_bytes())


def test_a_cache_continues_after_a_full_disk(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(write, "computation", small_cache.arithmetic)
    monkeypatch.setattr(write, "computing", lambda made, device_mesh: {})
    stage = small_cache.pictures(small_cache.draw(tmp_path / "pictures", 12))
    made = cache_plan.make(stage, tmp_path / "cache", "", 5)
    capfd.readouterr()
    with full_at(800), pytest.raises(CannotWrite, match=r"\(File too large\)") as caught:
        write.run(made, 4)
    assert caught.value.code == UNWRITABLE and str(tmp_path / "cache") in str(caught.value)
    said = capfd.readouterr().err
    assert "Traceback" not in said and not half_written(tmp_path / "cache")
    assert write.run(made, 4) is not None


def test_similarities_that_do_not_fit(tmp_path):
    pytest.importorskip("torch")
    small_clip.write(tmp_path / "clip")
    run_import.run_import("clip", tmp_path / "clip", tmp_path / "base")
    given = dict(input=pairs(tmp_path), reader="coco", clip=str(tmp_path / "base"), batch=4)
    with full_at(100), pytest.raises(CannotWrite, match=r"\(File too large\)"):
        similar.build(output=str(tmp_path / "out"), **given)
    assert not half_written(tmp_path / "out")


def test_a_picture_that_does_not_fit_ends_the_chat(tmp_path):
    picture = Picture("image", np.zeros((16, 64), np.float32))

    def answer(*_: object) -> str:
        with full_at(1000):
            return str(drawing.embeddings(picture, tmp_path / "image_0"))

    said: list[str] = []
    with pytest.raises(CannotWrite, match=r"image_0\.npz: cannot be written"):
        chat.converse(["a circle"], answer, said.append, 3, {})
    assert not list(tmp_path.iterdir()) and not any("cannot be" in line for line in said)


def test_a_vocabulary_that_does_not_fit(tmp_path):
    with full_at(1000), pytest.raises(CannotWrite, match=r"ice_text\.model"):
        train_tokenizer(
            ["一个红色的圆", "一个蓝色的方"], tmp_path / "made", learned=20, longest=2, words=[]
        )
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_prepared_set_that_does_not_fit(workers, tmp_path):
    command = (sys.executable, "-m", "xllm_jax.launch.commands", "prepare", "--source=coco")
    flags = (f"--input={pairs(tmp_path)}", "--output=out", f"--workers={workers}", "--deadline=0")
    done = forked.run(
        [*restricted(1500), *command, *flags],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.replace("\r", "\n").splitlines()
    silent = ("items/s", "records/s", "it/s", "INFO:__main__:", "apitools not found")
    kept = [one for one in lines if one.strip() and not any(word in one for word in silent)]
    assert (done.returncode, len(kept)) == (UNWRITABLE, 1), kept
    assert "out" in kept[0] and "cannot be written (File too large)" in kept[0]
    assert not half_written(tmp_path / "out")


def test_what_is_only_remembered_may_stay_unwritten(tmp_path, monkeypatch):
    """The index of a tar and what was found whole: without room they are made again."""
    tar = tmp_path / "a.tar"
    tar.write_bytes(bytes(2000))
    rows = np.zeros((40, tar_index.COLUMNS), np.int64)
    with full_at(100):
        np.testing.assert_array_equal(tar_index.kept(tar, lambda _: rows), rows)
    assert not half_written(tmp_path)
    shard = tmp_path / "set" / "s.array_record-00000-of-00001"
    shard.parent.mkdir()
    shard.write_bytes(b"12345")
    one = {"file": shard.name, "bytes": 5, "sha256": atomic.sha256(shard)}
    manifest = {"splits": {"train": {"shards": [one]}}}
    (shard.parent / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "memory"))
    with full_at(10):
        verified.check(shard.parent, "train")
    assert not half_written(tmp_path)
