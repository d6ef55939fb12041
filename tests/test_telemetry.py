"""What a run tells about itself: means that weigh tokens alike, speeds, MFU, compilations."""

from __future__ import annotations

import json
import math
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_speech

from xllm_jax.core import chips
from xllm_jax.core.batch import zeros
from xllm_jax.core.errors import UserError
from xllm_jax.core.log import Log
from xllm_jax.core.weighted_mean import WeightedMean
from xllm_jax.data import mixture
from xllm_jax.objectives.answer import answer_loss, carriers
from xllm_jax.training import loop, telemetry
from xllm_jax.training.step import gradient_norms


def packed(rng, rows=3, length=12, answers=5):
    """A batch of packed examples with images and speech here and there."""
    batch = zeros(rows, length, answers, 2, {"image": (1, (2,)), "speech": (1, (2,))})
    batch.segments[:] = np.sort(rng.integers(0, 4, (rows, length)))[:, ::-1]
    batch.answer_index[:] = rng.integers(0, length, (rows, answers))
    batch.weights[:] = rng.integers(0, 2, (rows, answers))
    for media in batch.media.values():
        media.index[:] = np.where(rng.random((rows, length)) < 0.15, 0, -1)
    return batch


def test_losses_of_modalities_are_those_of_their_examples():
    """Against loops over rows, tokens and examples; over two micro-batches."""
    rng, states, head = np.random.default_rng(0), (3, 12, 4), (4, 7)
    head = rng.normal(size=head).astype(np.float32)
    rows, sums = [], {}
    for _ in range(2):
        batch, x = packed(rng), rng.normal(size=states).astype(np.float32)
        targets_ = rng.integers(0, 7, batch.targets.shape)
        _, metrics = answer_loss(
            lambda s: s @ head, jnp.asarray(x), batch.answer_index, targets_, batch.weights,
            kinds=carriers(batch),
        )  # fmt: skip
        rows.append(jax.device_get({k: v for k, v in metrics.items() if "/" in k}))
        for b, a in np.ndindex(*batch.weights.shape):
            place = batch.answer_index[b, a]
            scores = x[b, place].astype(np.float64) @ head
            nll = np.log(np.exp(scores).sum()) - scores[targets_[b, a]]
            same = batch.segments[b] == batch.segments[b, place]
            carried = [n for n, m in batch.media.items() if (m.index[b][same] >= 0).any()]
            for name in carried or ["text"]:
                total, count = sums.get(name, (0.0, 0.0))
                weight = batch.weights[b, a]
                sums[name] = (total + weight * nll, count + weight)
    found = telemetry.means(rows)
    assert found.keys() == {f"loss/{name}" for name, (_, count) in sums.items() if count}
    assert len(found) == 3
    for name, value in found.items():
        total, count = sums[name.removeprefix("loss/")]
        np.testing.assert_allclose(value, total / count, rtol=1e-5)


def test_a_batch_that_can_hold_no_media_has_one_loss():
    assert carriers(zeros(1, 4, 2, 2)) == {}


def test_means_leave_out_what_is_no_number():
    rows = [
        {
            "loss": np.float32(2),
            "part": WeightedMean(6.0, 3.0),
            "none": WeightedMean(0.0, 0.0),
            "odd": np.nan,
        },
        {
            "loss": np.float32(np.nan),
            "part": WeightedMean(np.nan, 5.0),
            "none": WeightedMean(0.0, 0.0),
            "odd": 1,
        },
        {
            "loss": np.float32(4),
            "part": WeightedMean(1.0, 1.0),
            "none": WeightedMean(0.0, 0.0),
            "odd": np.inf,
        },
    ]
    assert telemetry.means(rows) == {"loss": 3.0, "part": 7 / 4, "odd": 1.0}


def test_gradient_norms_are_those_of_each_part():
    rng = np.random.default_rng(0)
    tree = {name: {"a": rng.normal(size=(3, 2)), "b": rng.normal(size=4)} for name in ("x", "y")}
    norms = gradient_norms(jax.tree.map(jnp.asarray, tree))
    squares = {n: sum((leaf**2).sum() for leaf in part.values()) for n, part in tree.items()}
    expected = {f"gradient_norm/{n}": math.sqrt(s) for n, s in squares.items()}
    expected["gradient_norm"] = math.sqrt(sum(squares.values()))
    assert norms.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(norms[name], value, rtol=1e-6)


def test_useful_work_over_time_and_peak(monkeypatch):
    """A frozen layer behind a trained one: forward and two products there, forward and one here."""
    rows, width = 6, 8

    def loss(params, batch, key):
        hidden = batch["x"] @ params["own"]["kernel"]
        return (hidden @ params["base"]["kernel"]).sum(), {}

    kernel = jnp.ones((width, width))
    state = types.SimpleNamespace(trainable={"own": {"kernel": kernel}})
    state.frozen = {"base": {"kernel": kernel}}
    count, batch = telemetry.useful(loss), {"x": jnp.ones((rows, width))}
    # The batch itself needs no gradient: 2 products in the trained layer, 2 in the frozen one.
    assert count(state, batch) == 4 * 2 * rows * width * width
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    since = telemetry.Interval(count, peak=1000.0)
    for number in (1, 2):
        since.work(state, batch)
        since.wait(1.0)
        info = {"examples": 10, "padding": {"image": (1, 1), "tokens": (30, 90)}}
        since.add(number, {"loss": jnp.float32(number)}, info)
    now[0] += 16.0
    found = since.scalars()
    assert found == {
        "loss": 1.5, "samples_per_second": 20 / 16, "tokens_per_second": 60 / 16,
        "step_seconds": 8.0, "input_wait": 2 / 16, "mfu": 2 * count(state, batch) / 16 / 1000,
    }  # fmt: skip


def test_no_peak_rather_than_a_wrong_one():
    def device(kind):
        return types.SimpleNamespace(device_kind=kind)

    assert telemetry.peak([device("NVIDIA H200")] * 2) == 2 * chips.CHIPS["h200"].flops
    assert telemetry.peak([device("TPU v5 lite")]) == chips.CHIPS["v5e"].flops
    for unknown in ("cpu", "NVIDIA H200 NVL", "NVIDIA H100 PCIe", "TPU v7"):
        assert telemetry.peak([device("NVIDIA H200"), device(unknown)]) == 0
    assert telemetry.peak(jax.devices()) == 0
    assert telemetry.memory().keys() == {"memory/host_gib"}


def test_a_compilation_too_many_is_told():
    said = []
    step = jax.jit(lambda state, batch: (state + 1, batch["x"] * 2))
    with telemetry.Compilations(step, 2, said.append) as watched:
        for length in (3, 5, 3, 5):
            watched(0, {"x": np.zeros(length), "y": np.zeros(1)})
        assert watched.count == 2 and said == []
        jax.jit(lambda x: x + 3)(1)  # not the step
        assert watched.count == 2
        watched(0, {"x": np.zeros(4), "y": np.zeros(1)})
        watched(0.5, {"x": np.zeros(4), "y": np.zeros(1)})
    assert watched.count == 4
    assert "3 times so far, 2 needed" in said[0] and "['x'] float64[" in said[0]
    assert "-> float64[4]" in said[0] and "['y']" not in said[0]
    assert "shapes are known" in said[1] and len(said) == 2


@pytest.mark.parametrize("steps", [(3,), (0, 2), (5, 4)])
def test_a_wrong_range_to_trace_is_refused(steps, tmp_path):
    with pytest.raises(UserError, match="profile"):
        telemetry.Profile(steps, tmp_path)


def test_scalars_reach_weights_and_biases(tmp_path, monkeypatch):
    """Through a stand-in; a resumed run keeps its id."""
    said = []

    def init(**fields):
        said.append(fields)
        return types.SimpleNamespace(
            log=lambda scalars, step: said.append((step, scalars)),
            finish=lambda: said.append("finish"),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 1):
        log = Log(tmp_path, "run", total=2, start=start, wandb="project")
        log.write(start + 1, {"loss": 0.5})
        log.close()
    first, second = said[0], said[3]
    assert first["project"] == "project" and first["name"] == "run" and first["resume"] == "allow"
    assert first["id"] == second["id"]
    assert said[1:3] == [(1, {"loss": 0.5}), "finish"] and said[4] == (2, {"loss": 0.5})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[wandb\]'"):
        Log(tmp_path, "run", total=2, start=0, wandb="project")


def test_a_run_compiles_once_for_every_length_bucket(tmp_path, monkeypatch, capsys):
    stage, examples = small_speech.make(tmp_path)
    monkeypatch.setattr(mixture, "read", lambda *_, **__: examples)
    shapes, noted = set(), telemetry.Interval.work
    monkeypatch.setattr(
        telemetry.Interval,
        "work",
        lambda self, state, batch: shapes.add(batch.features.shape) or noted(self, state, batch),
    )
    loop.fit(stage, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(shapes) == 2
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert lines[-1]["compilations"] == 2 and lines[0]["compilations"] <= 2
    said = capsys.readouterr().err
    assert "compiled again" not in said and "Trace of micro-batches 4 to 5" in said
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    names = {"loss", "ctc", "cross_entropy", "quantity", "learning_rate", "bad_records"}
    names |= {"gradient_norm", *(f"gradient_norm/{part}" for part in stage.parts)}
    names |= {"samples_per_second", "tokens_per_second", "step_seconds", "input_wait"}
    assert names <= lines[-1].keys() and "mfu" not in lines[-1]
