"""The training loop: what is frozen stays, runs resume exactly, devices change nothing."""

from __future__ import annotations

import dataclasses
import functools
import random
import sys
import time

import forked
import jax
import numpy as np
import pytest
import restore_check
import small_stage
import virtual_devices

from xllm_jax.assembly import networks, parameters
from xllm_jax.assembly.system import System
from xllm_jax.core import base_description, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.preflight import micro_batch
from xllm_jax.training import loop
from xllm_jax.training.step import step_key, train_step
from xllm_jax.training.trainer import Trainer

SECONDS = 240  # bound on one training process, far above what it takes


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without interruption: its folder."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.fit(small_stage.stage(), workdir)
    return workdir


def load(workdir) -> dict[str, np.ndarray]:
    """Final parameters of a run, flat."""
    made = small_stage.stage(init={"llm": str(workdir)})
    params = parameters.parameters(System.build(made, mesh.make({})))
    return {path: np.asarray(leaf) for path, leaf in rules.flatten(params).items()}


def fresh() -> dict[str, np.ndarray]:
    """The parameters that every small run starts from, flat."""
    made = small_stage.stage()
    params = parameters.parameters(System.build(made, mesh.make({})))
    return {path: np.asarray(leaf) for path, leaf in rules.flatten(params).items()}


def test_only_the_allow_list_trains(whole):
    before, after = fresh(), load(whole)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    wanted = rules.split(small_stage.stage().trainable, rules.unflatten(before))[0]
    assert changed == rules.flatten(wanted).keys()
    assert "llm/embedding" not in changed


def test_the_optimizer_holds_nothing_for_frozen_leaves():
    made = small_stage.stage()
    state = Trainer(System.build(made, mesh.make({}))).initial_state()
    trainable = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * trainable


def test_compiler_options_are_those_of_the_platform():
    """The other tests' stage has an option for TPUs that no compiler knows."""
    made = small_stage.stage(compiler={"cpu": {"xla_no_such_option": 1}})
    device_mesh = mesh.make({})
    trainer = Trainer(System.build(made, device_mesh))
    batch = micro_batch.sharded(made.data, device_mesh)
    with jax.set_mesh(device_mesh), pytest.raises(Exception, match="xla_no_such_option"):
        trainer.step.lower(trainer.abstract_state, batch).compile()


def test_a_stopped_run_continues_exactly(whole, tmp_path):
    loop.fit(small_stage.stage(), tmp_path, stop_after=3)
    assert not (tmp_path / "final").exists()
    loop.fit(small_stage.stage(), tmp_path)
    assert small_stage.curve(tmp_path) == small_stage.curve(whole)
    before, after = load(whole), load(tmp_path)
    assert all(np.array_equal(before[path], after[path]) for path in before)


def test_a_killed_run_continues_exactly(whole, tmp_path):
    process = small_stage.start(tmp_path)
    wanted, log, deadline = random.randint(1, 4), tmp_path / "metrics.jsonl", time.time() + SECONDS
    while time.time() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count("\n") >= wanted:
            break
        time.sleep(0.005)
    process.kill()
    process.communicate()
    second = small_stage.start(tmp_path)
    said, _ = second.communicate(timeout=SECONDS)
    assert second.returncode == 0, said
    killed, reference = small_stage.curve(tmp_path), small_stage.curve(whole)
    assert killed.keys() == reference.keys()
    np.testing.assert_allclose(list(killed.values()), list(reference.values()), rtol=1e-6)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_devices_change_nothing(whole, tmp_path, axes):
    process = small_stage.start(tmp_path, f"made.mesh = {axes}", devices=8)
    said, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    losses, reference = small_stage.curve(tmp_path), small_stage.curve(whole)
    np.testing.assert_allclose(list(losses.values()), list(reference.values()), rtol=2e-4)


def test_a_checkpoint_goes_on_on_other_meshes(whole, tmp_path):
    """From 8 devices that split the parameters to 4, to other axes, and to one."""
    paths = f"{small_stage.ROOT}:{small_stage.ROOT / 'tests'}"
    environment = virtual_devices.environment(8) | {"PYTHONPATH": paths}
    done = forked.run(
        [sys.executable, "tests/restore_check.py", str(tmp_path), str(whole)],
        capture_output=True, text=True, cwd=small_stage.ROOT, env=environment, timeout=3 * SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loop.fit(restore_check.stage(whole), tmp_path / "half")
    reference = small_stage.curve(whole)
    for name in ("half", *restore_check.OTHERS):
        losses = small_stage.curve(tmp_path / name)
        assert losses.keys() == reference.keys()
        np.testing.assert_allclose(list(losses.values()), list(reference.values()), rtol=2e-4)
    resumed = done.stdout.count(f"Resumes at micro-batch {restore_check.HALF}")
    assert resumed == len(restore_check.OTHERS)


def test_another_base_is_refused(whole, tmp_path):
    made = small_stage.stage(seed=1, init={"llm": str(whole)})
    loop.fit(small_stage.stage(init={"llm": str(whole)}), tmp_path, stop_after=2)
    made.init = {}
    with pytest.raises(UserError, match="another llm"):
        loop.fit(made, tmp_path)


def test_a_base_of_another_size_is_refused(whole):
    made = small_stage.stage(init={"llm": str(whole)})
    made.parts["llm"].fields["hidden"] = 96
    with pytest.raises(UserError, match=r"llm/layers/feed_forward.*shape"):
        parameters.parameters(System.build(made, mesh.make({})))


def test_heads_that_do_not_divide_the_width_are_refused():
    made = small_stage.stage()
    made.parts["llm"].fields |= {"width": 33}
    with pytest.raises(UserError, match="33 is no multiple of 2 heads") as refused:
        networks.model(made)
    assert refused.value.field == "parts.llm.fields"


def test_a_subtree_can_come_from_a_run(whole):
    made = small_stage.stage(init={"llm/layers": str(whole)})
    params = rules.flatten(parameters.parameters(System.build(made, mesh.make({}))))
    trained, drawn = load(whole), fresh()
    for path, leaf in params.items():
        expected = trained if path.startswith("llm/layers/") else drawn
        np.testing.assert_array_equal(leaf, expected[path])


def test_accumulation_equals_a_larger_batch(tmp_path):
    """Two micro-batches of one update: the update is that of the mean over all their tokens."""
    made = small_stage.stage(steps=1)
    made.optimizer = dataclasses.replace(made.optimizer, accumulation=2, clip=0.0)
    device_mesh = mesh.make({})
    trainer = Trainer(System.build(made, device_mesh))
    state, loss, optimizer = trainer.initial_state(), trainer.loss, trainer.optimizer
    batches = loop.Pipeline(made.data, made.seed).iterate()
    two = [mesh.to_global(device_mesh, next(batches)[0]) for _ in range(2)]
    keys = [step_key(made.seed, number) for number in range(2)]

    def both(trainable):
        params = rules.join(trainable, state.frozen)
        found = [loss(params, batch, key) for batch, key in zip(two, keys)]
        counts = [metrics["count"] for _, metrics in found]
        return sum(mean * count for (mean, _), count in zip(found, counts)) / sum(counts)

    gradients = jax.jit(jax.grad(both))(state.trainable)
    single = dataclasses.replace(made, optimizer=dataclasses.replace(made.optimizer))
    single.optimizer.accumulation = 1
    plain = Trainer(System.build(single, device_mesh)).optimizer

    @jax.jit
    def updated(gradients, trainable):
        updates, _ = plain.update(gradients, plain.init(trainable), trainable)
        return jax.tree.map(lambda p, u: p + u, trainable, updates)

    expected = updated(gradients, state.trainable)
    step = jax.jit(
        functools.partial(
            train_step, loss=loss, optimizer=optimizer, policy=made.divergence, seed=made.seed
        )
    )
    for batch in two:
        state, _ = step(state, batch)
    for path, leaf in rules.flatten(state.trainable).items():
        wanted = rules.flatten(expected)[path]
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=2e-5, err_msg=path)


def test_half_a_base_is_never_picked_up(whole, tmp_path):
    (tmp_path / "base.partial").mkdir()
    with pytest.raises(UserError, match="no base or finished run"):
        base_description.base_about(tmp_path / "base")
