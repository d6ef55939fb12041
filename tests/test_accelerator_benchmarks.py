"""The measurements for an accelerator, at the tiny size on the CPU: they run, and they compare.

Both sides of stage 2 run in this process instead of one each, which spares their imports.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import decode
import stage2_image
import stage2_image_torch
import torch

FLAGS = ("--size=tiny", "--steps=1", "--rounds=2", "--torch_mode=none")


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """(folder with our weights, what our side says)."""
    folder = tmp_path_factory.mktemp("sides")
    choice = stage2_image.options([*FLAGS, f"--folder={folder}"])
    return folder, stage2_image.jax_side(choice)


@pytest.fixture
def command(ours, monkeypatch):
    """The command, with our side's results as they are known."""
    folder, found = ours

    def run_side(choice, side, _):
        choice.folder = str(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return dict(found) if side == "jax" else stage2_image_torch.side(choice)
        finally:
            torch.set_num_threads(threads)

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["stage2_image.py", *FLAGS, *more])
        stage2_image.main()

    monkeypatch.setattr(stage2_image, "run_side", run_side)
    return run


def test_both_sides_run_and_compute_the_same(command, tmp_path, capsys):
    file = tmp_path / "stage2_image.json"
    command(f"--output={file}")
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["sides"].keys() == {"jax", "torch"} and found["useful_flops"] > 0
    for side, result in found["sides"].items():
        assert len(result["seconds"]) == 2 and result["step_seconds"] > 0
        assert len(result["losses"]) == 4  # three of the warm-up, and the last of two steps
        assert result["version"].startswith(side) and result["device"] == "cpu"
        assert f"{side}: " in printed
    assert found["ratio"] == pytest.approx(
        found["sides"]["torch"]["step_seconds"] / found["sides"]["jax"]["step_seconds"]
    )
    losses = found["sides"]["jax"]["losses"]
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]  # it learns
    assert "MFU unknown: no peak for this device" in printed
    assert f"ours is {found['ratio']:.2f} x as fast as PyTorch" in printed


def other_layer(model):
    """One layer of the LLM with other weights, by a hundredth."""
    model.llm.layers[0].up.weight.mul_(1.01)


def other_pixels(model):
    """One layer of the vision encoder, by a twentieth."""
    model.vision.encoder.layers[0].mlp.fc1.weight.mul_(1.05)


def other_queries(model):
    """Keys of the Q-Former, by a twentieth."""
    model.qformer.encoder.layer[0].crossattention.attention.key.weight.mul_(1.05)


@pytest.mark.parametrize("change", [other_layer, other_pixels, other_queries])
def test_another_part_is_no_number(command, change, monkeypatch):
    load = stage2_image_torch.load

    def other(model, file):
        load(model, file)
        with torch.no_grad():
            change(model)

    monkeypatch.setattr(stage2_image_torch, "load", other)
    with pytest.raises(SystemExit, match="do not compute the same"):
        command()


def test_another_update_is_no_number(command, monkeypatch):
    monkeypatch.setattr(stage2_image, "RATE", 1.05 * stage2_image.RATE)
    with pytest.raises(SystemExit, match="do not compute the same"):
        command()


DECODE = ("--size=tiny", "--batches=1,3", "--prompt=5", "--tokens=6", "--rounds=1")


def test_decoding_runs_and_its_tokens_are_the_best(tmp_path, capsys):
    file = tmp_path / "decode.json"
    decode.main([*DECODE, f"--output={file}"])
    printed = capsys.readouterr().out.splitlines()
    found = json.loads(file.read_text())
    assert printed[0].startswith("cpu, jax") and [row["rows"] for row in found["rows"]] == [1, 3]
    weights = 4 * (512 * 128 + 5 * (12 * 128**2 + 13 * 128) + 2 * 128)  # float32, ChatGLM's layer
    for row, said in zip(found["rows"], printed[1:], strict=True):
        cache = 2 * 5 * 128 * 4 * (5 + 6 / 2) * row["rows"]
        assert row["bytes_a_token"] == weights + cache
        assert row["first_token_seconds"] > 0 and said.startswith(f"{row['rows']} rows: ")


def test_other_tokens_are_no_number(monkeypatch):
    whole = decode.answer

    def other(model, params, ids, count):
        tokens = whole(model, params, ids, count)
        return tokens.at[0, -1].add(1)

    monkeypatch.setattr(decode, "answer", other)
    with pytest.raises(SystemExit, match="1 of 6 tokens are not those of a pass without a cache"):
        decode.main([*DECODE, "--batches=1"])
