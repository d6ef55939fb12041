"""The measurement against PyTorch on a CPU: it runs, and refuses what is not the same."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cpu
import cpu_rows

FEW = ["--size=tiny", "--repetitions=3", "--compile_seconds=0"]


def test_rows_run_and_their_table_stands(tmp_path, capsys):
    file = tmp_path / "cpu.json"
    cpu.main([*FEW, "--rows=vit_backward,cif_backward", f"--json={file}"])
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert [row["row"] for row in found["rows"]] == ["vit_backward", "cif_backward"]
    for row in found["rows"]:
        assert 0 < row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["ratio"]["median"] == pytest.approx(row["eager_ms"] / row["ours_ms"], rel=0.9)
        assert f"| {row['row']} | {row['sizes']} |" in printed
    assert found["machine"]["torch"] in printed
    assert found["machine"]["products"].keys() == {"PyTorch", "XLA"}


def test_another_result_is_no_number(monkeypatch):
    """One wrong value of the output, or of the gradient of one parameter, among all of them."""
    make, goal = cpu_rows.ROWS["vit_backward"]
    pair = make("tiny")
    gradients, output = pair.ours()
    attention = gradients["layers"]["attention"]
    bias = attention["value"]["bias"]
    wrong = gradients | {
        "layers": gradients["layers"]
        | {"attention": attention | {"value": {**attention["value"], "bias": bias.at[1].mul(1.1)}}}
    }
    for result, name in (
        ((gradients, output.at[0, 0, 0].add(0.01)), "output"),
        ((wrong, output), "gradient of .*layers.1.*qkv.bias"),
    ):
        other = dataclasses.replace(pair, ours=lambda result=result: result)
        monkeypatch.setitem(cpu_rows.ROWS, "vit_backward", (lambda _, other=other: other, goal))
        with pytest.raises(SystemExit, match=f"vit_backward: {name} differs by"):
            cpu.main([*FEW, "--rows=vit_backward"])


def test_a_nan_and_another_token_are_refused():
    with pytest.raises(SystemExit, match="states differs by nan"):
        cpu.agree("row", [("states", np.array([np.nan, 1.0]), np.array([1.0, 1.0]))])
    with pytest.raises(SystemExit, match="tokens differ"):
        cpu.agree("row", [("tokens", np.array([100_000, 7]), np.array([100_001, 7]))])
    with pytest.raises(SystemExit, match=r"states is \(2,\) here"):
        cpu.agree("row", [("states", np.zeros(2), np.ones((2, 1)))])


def test_the_interval_holds_the_median_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [
        found["low"] <= 1.0 <= found["high"]
        for found in (cpu.median(rng.lognormal(0, 0.3, 40)) for _ in range(2000))
    ]
    assert 0.93 < np.mean(held) < 0.99


def test_an_unknown_row_is_told(capsys):
    with pytest.raises(SystemExit):
        cpu.options(["--rows=vit"])
    assert "no row vit" in capsys.readouterr().err
