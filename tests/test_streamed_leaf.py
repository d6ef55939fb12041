"""Leaves that are written block by block: few files, bounded memory, the first error and nothing
else."""

from __future__ import annotations

import numpy as np
import pytest

from xllm_jax.core import checkpoint, streamed_leaf
from xllm_jax.core.errors import UserError
from xllm_jax.core.streamed_leaf import Blocks

LEAVES = 60


def blocks(path, value, rows, before=lambda number: None):
    """A leaf of `value`, `rows` at a time; `before` hears of each block."""

    def each():
        for number, start in enumerate(range(0, len(value), rows)):
            before(number)
            yield value[start : start + rows]

    return Blocks(path, value.shape, value.dtype, rows, each)


def test_many_small_leaves_share_few_files(tmp_path):
    values = {
        f"layer_{number}": np.full((6, 5), number, np.float32) + np.arange(5, dtype=np.float32)
        for number in range(LEAVES)
    }
    leaves = {name: blocks(name, value, 2) for name, value in values.items()}
    leaves["count"] = Blocks("count", (), np.dtype(np.int32), 0, lambda: iter([np.int32(7)]))
    checkpoint.save_base(tmp_path / "base", {"unet": leaves}, {})
    files = [file for file in (tmp_path / "base").rglob("*") if file.is_file()]
    assert len(files) < LEAVES / 2, files
    held = checkpoint.open_leaves(tmp_path / "base")
    assert held.keys() == {f"unet/{name}" for name in leaves}
    for name, value in values.items():
        store = held[f"unet/{name}"]
        assert store.chunk_layout.read_chunk.shape == (2, 5)
        np.testing.assert_array_equal(store.read().result(), value)
    assert held["unet/count"].read().result() == 7


def test_blocks_wait_for_the_disk_before_the_next(tmp_path, monkeypatch):
    made, waiting = [], []

    class Handler(streamed_leaf.BlocksHandler):
        def __init__(self):
            super().__init__()
            made.append(self)

    def look(number):
        waiting.append(sum(size for size, one in made[0]._waiting if not one.done()))

    monkeypatch.setattr(checkpoint, "BlocksHandler", Handler)
    monkeypatch.setattr(streamed_leaf, "UNCOMMITTED", 3000)
    value = np.arange(40 * 100, dtype=np.float32).reshape(40, 100)
    leaves = {name: blocks(name, value, 2, look) for name in "abc"}  # of 800 bytes each
    checkpoint.save_base(tmp_path / "base", {"llm": leaves}, {})
    assert len(waiting) == 3 * 20 and max(waiting) <= 3000
    for store in checkpoint.open_leaves(tmp_path / "base").values():
        np.testing.assert_array_equal(store.read().result(), value)


def test_the_first_error_ends_the_writing(tmp_path):
    asked = []

    def leaf(name, broken):
        def before(number):
            asked.append(name)
            if broken and number == 1:
                raise UserError("is damaged", field=name)

        return blocks(name, np.ones((4, 3), np.float32), 1, before)

    leaves = {name: leaf(name, name in "bc") for name in "abcd"}
    with pytest.raises(UserError, match="b: is damaged"):
        checkpoint.save_base(tmp_path / "base", {"llm": leaves}, {})
    assert asked == ["a"] * 4 + ["b"] * 2 and not list(tmp_path.iterdir())
