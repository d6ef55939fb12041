"""Replaying recordings: a true one passes, and whatever is wrong in one is reported by name."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import forked
import numpy as np
import pytest

from xllm_jax.convert import verify
from xllm_jax.convert.verify import tolerances
from xllm_jax.convert.verify.recording import MISS, MISSING, PASS
from xllm_jax.core.errors import UserError
from xllm_jax.launch import convert as launcher

ROOT = Path(__file__).parents[1]
FILE = "decoder_cross_attn"


def quiet(line):
    pass


def copy(golden, folder, change=None):
    """A recording of one small file, changed by `change(arrays)`."""
    for name in (f"{FILE}.json", "README.md"):
        shutil.copy(golden / "speech" / name, folder / name)
    # The README lists other files as well; only what lies in the folder is replayed.
    with np.load(golden / "speech" / f"{FILE}.npz") as file:
        arrays = dict(file)
    if change:
        change(arrays)
    np.savez(folder / f"{FILE}.npz", **arrays)
    return arrays


def missed(rows):
    """{array: verdict} of what failed."""
    return {row.array: row.verdict for row in rows if row.missed}


@pytest.mark.golden
def test_a_true_recording_passes(golden, tmp_path):
    arrays = copy(golden, tmp_path)
    lines = []
    rows = verify.replay(tmp_path, lines.append)
    outputs = {name for name in arrays if name.startswith("out")}
    assert {row.array for row in rows} == outputs and all(row.verdict == PASS for row in rows)
    stated = tolerances.read(golden / "speech").numbers(FILE)[0]
    for row in rows:
        assert row.absolute <= row.tolerance == stated
        assert row.relative == pytest.approx(row.absolute / np.abs(arrays[row.array]).max())
    text = verify.table(rows)
    assert text.endswith(f"all {len(rows)} within tolerance") and "out_ctx_masked" in text
    assert lines == [f"{FILE}.npz: {len(rows)} arrays, 0 missed"]


def raise_one(name):
    """Moves the largest element of an array by a tenth of itself."""

    def change(arrays):
        value = arrays[name].copy()
        value.flat[np.abs(value).argmax()] *= 1.1
        arrays[name] = value

    return change


def cut(arrays):
    arrays["out_ctx_zero"] = arrays["out_ctx_zero"][:, :-1]


def as_text(name):
    """The same values, but as text."""
    return lambda arrays: arrays.update({name: arrays[name].astype(str)})


def poison(arrays):
    arrays["out_ctx_zero"] = np.full_like(arrays["out_ctx_zero"], np.nan)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (raise_one("layer/fc1.weight"), dict.fromkeys(["out_ctx_masked", "out_no_ctx"], MISS)),
        (raise_one("out_no_ctx"), {"out_no_ctx": MISS}),
        (cut, {"out_ctx_zero": MISS}),
        (as_text("out_ctx_zero"), {"out_ctx_zero": MISS}),
        (as_text("layer/fc1.bias"), {"layer/fc1.bias": MISS}),
        (poison, {"out_ctx_zero": MISS}),
        (lambda arrays: arrays.pop("out_no_ctx"), {"out_no_ctx": MISSING}),
        (lambda arrays: arrays.pop("layer/fc1.weight"), {"layer/fc1.weight": MISSING}),
        (lambda arrays: arrays.pop("ctx_pad_mask"), {"ctx_pad_mask": MISSING}),
    ],
    ids=[
        "weight",
        "output",
        "shape",
        "text",
        "text weight",
        "nan",
        "no output",
        "no weight",
        "no input",
    ],
)
def test_what_is_wrong_is_named(golden, tmp_path, monkeypatch, capsys, change, expected):
    copy(golden, tmp_path, change)
    monkeypatch.setattr(launcher, "VERIFY", types.SimpleNamespace(value=str(tmp_path)))
    assert launcher.main([]) == 1
    printed = capsys.readouterr().out
    rows = lines_of(printed)
    for name, verdict in expected.items():
        assert verdict in rows[name], printed
    if next(iter(expected)).startswith("out") and len(expected) == 1:  # only this one is wrong
        assert [name for name, line in rows.items() if MISS in line] == list(expected)
    assert "missed" in printed.splitlines()[-1]


def lines_of(printed):
    """{array: its line} of a printed table."""
    lines = [line.split() for line in printed.splitlines() if line.startswith(f"{FILE}.npz ")]
    return {words[1]: " ".join(words[2:]) for words in lines}


@pytest.mark.golden
def test_the_tolerance_is_the_recordings_own(golden, tmp_path):
    """Stated tighter in the README, or array by array in tolerances.json, it is missed."""
    copy(golden, tmp_path)
    (tmp_path / tolerances.FILE).write_text(
        json.dumps({"arrays": {f"{FILE}.npz": {"out_ctx_zero": {"atol": 0.5}}}})
    )
    readme = (tmp_path / "README.md").read_text("utf-8")
    line = next(line for line in readme.splitlines() if line.startswith(f"| {FILE}.npz |"))
    (tmp_path / "README.md").write_text(readme.replace(line, f"| {FILE}.npz | 1e-12 |"), "utf-8")
    rows = {row.array: row for row in verify.replay(tmp_path, quiet)}
    assert rows["out_ctx_zero"].verdict == PASS and rows["out_ctx_zero"].tolerance == 0.5
    others = [row for name, row in rows.items() if name != "out_ctx_zero"]
    assert {(row.verdict, row.tolerance) for row in others} == {(MISS, 1e-12)}
    (tmp_path / "README.md").write_text(readme.replace(line, f"| {FILE}.npz | small |"), "utf-8")
    assert missed(verify.replay(tmp_path, quiet))["README.md"] == MISS


@pytest.mark.golden
def test_a_recording_from_elsewhere(golden, tmp_path):
    """Own names of cases, some arrays only, no README, any name and place of the folder."""
    folder = tmp_path / "several" / "mine"
    shutil.copytree(golden / "chatglm" / "weights", folder / "weights")
    with np.load(golden / "chatglm" / "cases_text.npz") as file:
        kept = ("input_ids", "embed", "block0", "final_ln", "logits")
        arrays = {f"first.{name}": file[f"gmask.{name}"] for name in kept}
    np.savez(folder / "cases_text.npz", **arrays)
    rows = verify.replay(tmp_path / "several", quiet)
    assert {row.array for row in rows} == arrays.keys() - {"first.input_ids"}
    assert {row.file for row in rows} == {"mine/cases_text.npz"} and not missed(rows)
    limits = {row.array: row.tolerance for row in rows}
    assert limits["first.logits"] == pytest.approx(2e-5 * np.abs(arrays["first.logits"]).max())
    raise_weight(folder / "weights", "transformer.final_layernorm.weight")
    found = missed(verify.replay(folder, quiet))
    assert found == {"first.final_ln": MISS, "first.logits": MISS}  # where the mistake is, and on


def raise_weight(folder, name):
    """Moves the largest element of a published tensor by a tenth of itself."""
    import torch

    for shard in folder.glob("*.bin"):
        state = torch.load(shard, weights_only=True)
        if name in state:
            flat = state[name].view(-1)
            flat[flat.abs().argmax()] *= 1.1
            torch.save(state, shard)


def test_an_unknown_folder_is_refused(tmp_path):
    np.savez(tmp_path / "holiday.npz", beach=np.ones(3))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"docs/recording\.md") as caught:
            verify.replay(folder, quiet)
        assert str(folder) in str(caught.value)


@pytest.mark.golden
def test_a_broken_file_is_refused(golden, tmp_path):
    copy(golden, tmp_path)
    path = tmp_path / f"{FILE}.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{FILE}.npz"):
        verify.replay(tmp_path, quiet)


def test_the_command_exits_with_two_on_an_unknown_folder(tmp_path):
    done = forked.run(
        [sys.executable, "launch/convert.py", f"--verify={tmp_path}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert str(tmp_path) in done.stderr and done.stdout == ""
