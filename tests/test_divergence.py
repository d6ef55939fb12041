"""A loss that is not finite: the run stops before it or skips it, and replays it."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_stage

from xllm_jax.assembly.system import System
from xllm_jax.core import checkpoint, mesh
from xllm_jax.core.batch import zeros
from xllm_jax.core.errors import Diverged, UserError
from xllm_jax.core.stage import Divergence
from xllm_jax.launch import cli
from xllm_jax.training import divergence, loop, nonfinite, replay, startup
from xllm_jax.training.trainer import Trainer

POISONED = 3  # number of the micro-batch
ROW = 5
HUGE = 2e38  # finite itself; a sum of several is not


class Poisoned:
    """Batches of a run of which one has a row of huge weights, or which lack that one."""

    def __init__(self, batches, position, drop, row=ROW):
        self._batches, self._drop, self._row = batches, drop, row
        self._number = 0 if position is None else position["next_index"]

    def position(self):
        return self._batches.position()

    def __next__(self):
        batch, info = next(self._batches)
        self._number += 1
        if self._number == POISONED:
            if self._drop:
                return next(self._batches)
            weights = batch.weights.copy()
            weights[self._row] = HUGE
            batch = dataclasses.replace(batch, weights=weights)
        return batch, info


def poison(monkeypatch, drop=False):
    opened = loop.open_batches
    monkeypatch.setattr(loop, "open_batches", lambda *a: Poisoned(opened(*a), a[-1], drop))


def small(**policy):
    made = small_stage.stage(log_every=4, save_every=100, unroll=1)
    made.parts["llm"].fields["depth"] = 1
    made.divergence = Divergence(**policy)
    return made


def saved(workdir, number):
    """Flat arrays of a checkpoint."""
    made = small()
    state = Trainer(System.build(made, mesh.make({}))).abstract_state
    checkpoints = checkpoint.Checkpoints(workdir)
    arrays = checkpoints.restore(number, startup.saved_arrays(state))
    checkpoints.close()
    return arrays


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that met the poisoned batch and stopped: its folder and its last words."""
    workdir = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        with pytest.raises(Diverged) as raised:
            loop.fit(small(), workdir)
    return workdir, str(raised.value)


def test_a_stop_names_step_samples_and_recording(stopped):
    workdir, said = stopped
    recording = replay.read(workdir / "replay" / f"{POISONED}.npz")
    assert "\n" not in said and f"micro-batch {POISONED};" in said
    assert recording.keys[0] in said and f"replay/{POISONED}.npz" in said
    assert recording.exact and recording.checkpoint == POISONED - 1
    assert not np.isfinite(recording.values["loss"])
    assert not (workdir / "final").exists()
    assert small_stage.curve(workdir) == {}  # the look comes before the line


def test_a_replay_finds_the_operation(stopped):
    workdir, _ = stopped
    recording = replay.read(workdir / "replay" / f"{POISONED}.npz")
    result = replay.run(recording, workdir)
    assert not result.finite and not np.isfinite(result.loss)
    assert result.batch == {} and result.parameters == {}
    assert "objectives/answer.py" in result.first and "NaN" in result.first
    recording.batch.weights[ROW, 2] = np.nan
    assert nonfinite.values(recording.batch) == {".weights": (ROW, 2)}
    lines = list(replay.format_message(recording, result))
    assert lines[1].startswith("loss nan") and lines[-1] == f"First: {result.first}"
    worse = dataclasses.replace(result, batch=nonfinite.values(recording.batch), first="")
    *_, last = replay.format_message(recording, worse)
    assert last.endswith(", ".join(recording.rows[ROW]))
    assert recording.rows[ROW] and set(recording.rows[ROW]) <= set(recording.keys)


def test_a_skip_leaves_the_batch_out(stopped, tmp_path, monkeypatch):
    """Going on with 'skip' equals a run that never saw the batch, optimizer included; so does the
    state that was saved when the run stopped."""
    workdir, made, other = stopped[0], small(nonfinite="skip"), small()
    before = saved(workdir, POISONED - 1)
    other.save_every, other.keep = POISONED - 1, made.steps
    with monkeypatch.context() as patch:
        poison(patch)
        loop.fit(made, workdir)
    with monkeypatch.context() as patch:
        poison(patch, drop=True)
        loop.fit(other, tmp_path, stop_after=made.steps - 1)
    theirs = saved(tmp_path, POISONED - 1)
    jax.tree.map(np.testing.assert_array_equal, before, theirs)
    ours, theirs = saved(workdir, made.steps), saved(tmp_path, made.steps - 1)
    for part in ("trainable", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, ours[part], theirs[part])
    assert int(ours["guard"]["skipped"]) == 1
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines] == [1, 1]
    assert all(np.isfinite(line["loss"]) for line in lines)


def reference(policy, losses, norms):
    """The policy in plain Python: (applied, halted) of every micro-batch."""
    recent, skipped, halted, found = [], 0, False, []
    for loss, norm in zip(losses, norms):
        finite = bool(np.isfinite([loss, norm]).all())
        spike = False
        if policy.spike != "ignore" and finite and len(recent) >= policy.window:
            last = np.asarray(recent[-policy.window :])
            spike = any(v > policy.factor * m for v, m in zip((loss, norm), np.median(last, 0)))
        if not halted and (spike or not finite):
            rule = policy.spike if spike else policy.nonfinite
            halted = rule == "stop" or skipped >= policy.most_skipped
            skipped += not halted
        applied = not halted and finite and not spike
        if applied:
            recent.append((loss, norm))
        found.append((applied, halted))
    return found


@pytest.mark.parametrize(
    "policy",
    [
        Divergence(),
        Divergence("skip", "skip", 3.0, 5),
        Divergence("skip", "skip", 3.0, 5, most_skipped=3),
        Divergence("skip", "stop", 4.0, 4),
        Divergence("stop", "skip", 2.0, 5),
    ],
    ids=str,
)
def test_the_verdict_is_the_policy(policy):
    generator = np.random.default_rng(1)
    losses, norms = np.exp(generator.normal(size=(2, 60)).astype(np.float32))
    losses[generator.integers(20, 60, 4)] = np.nan
    norms[generator.integers(20, 60, 2)] = np.inf
    judge = jax.jit(lambda guard, loss, norm: divergence.judge(policy, guard, loss, norm).__dict__)
    guard, found = divergence.initial_guard(policy), []
    for loss, norm in zip(losses, norms):
        verdict = judge(guard, loss, norm)
        guard = verdict["guard"]
        found.append((bool(verdict["applied"]), bool(verdict["halted"])))
    assert found == reference(policy, losses, norms)
    assert len(set(found)) > 1


def test_an_unknown_policy_is_refused():
    made = small(nonfinite="hope")
    with pytest.raises(UserError, match=r"divergence\.nonfinite.*'hope'.*stop, skip"):
        _ = Trainer(System.build(made, mesh.make({}))).abstract_state


def test_a_diverged_run_exits_with_its_own_code(capsys):
    def main(_):
        raise Diverged("The run diverged: at 7")

    cli.flags.FLAGS.mark_as_parsed()
    with pytest.raises(SystemExit) as raised:
        cli.guard(main, [])
    assert raised.value.code == cli.DIVERGED == 3
    assert capsys.readouterr().err == "The run diverged: at 7\n"


def test_the_search_goes_into_loops_branches_and_gradients():
    def body(x, row):
        return jax.lax.cond(row > 2, jnp.log, jnp.sin, x - row), None

    def looped(x):
        return jax.jit(lambda x: jax.lax.scan(body, x, jnp.arange(5.0))[0])(x).sum()

    assert nonfinite.first(looped, jnp.ones(3)).startswith("log in cond in turn 3 of 5 in scan")
    assert nonfinite.first(jax.grad(lambda x: jnp.sin(x).sum()), jnp.ones(2)) == ""
    root = jax.grad(lambda x: jnp.sqrt(x * 0).sum())
    assert "NaN" in nonfinite.first(root, jnp.ones(2))
    assert nonfinite.first(lambda x: 1 / x, jnp.zeros(2)).endswith("infinity")


def test_a_batch_keeps_its_arrays(tmp_path):
    """Through the file of one host, and joined from the files of three, two of them alike."""
    rng = np.random.default_rng(0)
    batch = zeros(4, 6, 3, 2, {"image": (1, (2, 2, 3))})
    batch = jax.tree.map(lambda x: rng.integers(0, 2, x.shape).astype(x.dtype), batch)
    halves = [jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], batch) for i in range(2)]
    about = {"step": 1, "seed": 0, "values": {}, "checkpoint": None}
    stage = small_stage.stage()
    stage.data.items, stage.data.embeddings = {"image": 1}, {"image": 2}
    stage.data.image = {"size": 2}
    about["stage"] = dataclasses.asdict(stage)
    about["hosts"] = 3
    for host, share in enumerate((0, 0, 1)):
        half, own = halves[share], about | {"share": share, "keys": [f"k{share}"]}
        own["rows"] = [[0, f"k{share}"]]  # its first
        arrays = {f"batch/{path}": leaf for path, leaf in divergence.flat(half).items()}
        np.savez(tmp_path / f"1.host{host}.npz", about=json.dumps(own), **arrays)
    recording = replay.read(tmp_path / "1.host0.npz")
    assert jax.tree.structure(recording.batch) == jax.tree.structure(batch)
    jax.tree.map(np.testing.assert_array_equal, recording.batch, batch)
    assert recording.keys == ("k0", "k1") and recording.rows == {0: ("k0",), 2: ("k1",)}
    with pytest.raises(UserError, match=r"no such file.*1\.host0"):
        replay.read(tmp_path / "2.npz")
    (tmp_path / "1.host2.npz").unlink()
    with pytest.raises(UserError, match=r"1\.host2\.npz: cannot be read"):
        replay.read(tmp_path / "1.host1.npz")
