"""A base or a run's result that a stranger made, or a disk has changed, is refused in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.assembly import parameters
from xllm_jax.core import base_description, checkpoint
from xllm_jax.core.errors import UserError
from xllm_jax.inference import load_run

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
LIKE = {
    "llm/a": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=ONE),
    "llm/b/c": jax.ShapeDtypeStruct((7,), jnp.float32, sharding=ONE),
}
VALUES = {"a": np.arange(64, dtype=np.float32).reshape(8, 8), "b": {"c": np.ones(7, np.float32)}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    checkpoint.save_base(folder, {"llm": jax.tree.map(jnp.asarray, VALUES)}, {"stage": {}})
    return folder


def use(folder) -> dict:
    """Whatever reads a base."""
    base_description.base_about(folder)
    base_description.base_origin(folder)
    for store in checkpoint.open_leaves(folder).values():
        assert store.shape
    return checkpoint.load_leaves(folder, "llm", LIKE)


def descriptions(about: dict) -> list[bytes]:
    """What may stand in about.json or conversion.json instead of what we wrote."""
    odd_shapes = [3, [], None, {"llm/a": 3}, {"llm/a": [["8", 8], "float32"], "llm/b/c": None}]
    odd_shapes += [{"llm/a": [[8, 8], "float32"], "../../x": [[1], "float32"]}]
    odd_shapes += [{"llm/a": [[2**62, 8], "float32"], "llm/b/c": [[-7], "float32"]}]
    odd = [json.dumps(about | {"shapes": shapes}).encode() for shapes in odd_shapes]
    return [b"", b"[]", b"null", b"{}", b"[" * 100_000, b"1" * 5000, b"\xff\xfe", *odd]


@pytest.mark.parametrize("name", ["about.json", "conversion.json"])
def test_a_description_of_another_form_is_refused(base, tmp_path, name):
    about = json.loads((base / "about.json").read_text())
    for number, content in enumerate(descriptions(about)):
        folder = shutil.copytree(base, tmp_path / str(number))
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{number}"):
            use(folder)


def test_changed_files_give_the_values_or_one_line(base, tmp_path):
    """As a command does it, which has nothing else to say when orbax gives up on a base."""
    code = "import sys, pathlib, test_damaged_base as t; t.change(*map(pathlib.Path, sys.argv[1:]))"
    code = f"from xllm_jax.core import disk; disk.say_once(); {code}; import gc; gc.collect()"
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = forked.run(
        [sys.executable, "-c", code, base, tmp_path],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr[-3000:]


GIVEN_UP = """
import inspect
from orbax.checkpoint._src.serialization import serialization
from xllm_jax.core import disk

async def ours(): pass

disk.say_once()
read = serialization._read_array_index_and_device_put
needed = inspect.signature(read).parameters.values()
read(**{one.name: None for one in needed if one.default is one.empty})
ours()
"""


def test_arrays_that_orbax_gave_up_are_not_told():
    """Which of them it has begun to read when one fails is a matter of time."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = forked.run(
        [sys.executable, "-c", GIVEN_UP], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "'ours' was never awaited" in done.stderr
    assert "_read_array" not in done.stderr


def change(base: Path, tmp_path: Path) -> None:
    """Uses a base with each file emptied, cut, turned round, gone, or with flipped bits; seeded."""
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    for file in sorted(f for f in base.rglob("*") if f.is_file()):
        whole = file.read_bytes()
        cases = [b"", whole[: len(whole) // 2], whole[::-1], None]
        for _ in range(6):
            case = bytearray(whole)
            for place in rng.sample(range(len(case)), min(len(case), rng.choice((1, 4)))):
                case[place] ^= 1 << rng.randrange(8)
            cases.append(bytes(case))
        for content in cases:
            folder = shutil.copytree(base, tmp_path / "case")
            changed = folder / file.relative_to(base)
            changed.unlink() if content is None else changed.write_bytes(content)
            try:
                use(folder)
                outcomes["read"] += 1
            except UserError as error:
                outcomes["refused"] += 1
                assert str(folder) in str(error) and "\n" not in str(error)
            shutil.rmtree(folder)
    assert outcomes["refused"] > 30 and outcomes["read"] > 30, outcomes


@pytest.mark.parametrize("left", [0, 0.5, None])
def test_arrays_that_are_cut_off_are_one_line(left, tmp_path):
    """Arrays beyond what orbax packs into its index; many are read at the same time."""
    rows = np.random.default_rng(0).normal(size=(20, 60, 60)).astype(np.float32)
    values = {str(number): jnp.asarray(row) for number, row in enumerate(rows)}
    checkpoint.save_base(tmp_path / "base", {"llm": values}, {"stage": {}})
    file = max((tmp_path / "base").rglob("*"), key=lambda file: file.stat().st_size)
    content = file.read_bytes()
    file.unlink() if left is None else file.write_bytes(content[: int(left * len(content))])
    code = "import sys, test_damaged_base as t; from xllm_jax.launch import cli; cli.run(t.load)"
    done = forked.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "DAMAGED": str(tmp_path / "base")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-3000:]
    assert f"{tmp_path}/base: is damaged (" in done.stderr


def load(_: list[str]) -> None:
    """A command that reads a base."""
    like = jax.ShapeDtypeStruct((60, 60), jnp.float32, sharding=ONE)
    names = [f"llm/{number}" for number in range(20)]
    checkpoint.load_leaves(os.environ["DAMAGED"], "llm", dict.fromkeys(names, like))


def test_a_run_that_starts_from_itself_is_refused(base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run / "final")
    about = json.loads((run / "final" / "about.json").read_text())
    for stage in ({"init": {"other": str(run)}}, {"init": 3}, {}, 7):
        (run / "final" / "about.json").write_text(json.dumps(about | {"stage": stage}))
        with pytest.raises(UserError, match=r"final(/about.json)?: is damaged"):
            parameters.places(run, "other")
        with pytest.raises(UserError):
            load_run.stage_of(run)
