"""Adapters in a stage: what they compute, what trains, where they come from, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_stage
import virtual_devices
from mesh_check import fill, values

from xllm_jax.assembly import adapters, parameters
from xllm_jax.assembly.system import System
from xllm_jax.convert import adapters_out
from xllm_jax.core import checkpoint, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.lora_settings import Lora
from xllm_jax.core.stage import Part
from xllm_jax.core.stage_record import parse_stage
from xllm_jax.data.batching import batch_format
from xllm_jax.inference import load_run
from xllm_jax.models import lora
from xllm_jax.training import loop
from xllm_jax.training.trainer import Trainer, stage_loss

LLAMA = {"vocab": 576, "width": 32, "depth": 2, "heads": 2, "hidden": 64, "key_heads": 1}


def small(family="glm", **settings):
    settings = {"rank": 4, "targets": "llm/layers/.*"} | settings
    made = small_stage.stage(trainable=(), lora=Lora(**settings))
    if family == "causal":
        made.parts = {"llm": Part("causal.Causal", "tiny", dict(LLAMA))}
        made.data.llm_family, made.data.template = "causal", "plain"
    return made


def moved(system):
    """Parameters of a system, adapters away from their start."""
    return {path: jnp.asarray(values(path, x)) for path, x in system.shapes.items()}


def batch_of(made):
    return fill(batch_format.find(made.data).shapes(), np.random.default_rng(0), {})


def by_hand(kernel, leaves, inputs):
    """One layer's kernel with its adapter, in float64: Hu et al. (3), Liu et al. (5)."""
    kernel, leaves = np.float64(kernel), {name: np.float64(x) for name, x in leaves.items()}
    rank, flat = leaves[lora.A].shape[-1], (np.prod(kernel.shape[:inputs]), -1)
    made = kernel.reshape(flat)
    made = made + leaves[lora.SCALE] * (
        leaves[lora.A].reshape(-1, rank) @ leaves[lora.B].reshape(rank, -1)
    )
    if lora.MAGNITUDE in leaves:
        made = leaves[lora.MAGNITUDE].reshape(-1) * made / np.linalg.norm(made, axis=0)
    return made.reshape(kernel.shape)


@pytest.mark.parametrize("family, dora", [("glm", True), ("causal", False)])
def test_a_network_with_adapters_is_the_network_with_merged_kernels(family, dora):
    made = small(family, dora=dora)
    system = System.build(made)
    flat, plain = moved(system), {}
    for path, x in flat.items():
        place = path.rpartition("/")[0]
        if lora.is_adapter(path):
            continue
        if f"{place}/{lora.A}" in flat and path.endswith("kernel"):
            leaves = {n: flat[f"{place}/{n}"] for n in lora.LEAVES if f"{place}/{n}" in flat}
            inputs = leaves[lora.A].ndim - 2
            layers = [
                by_hand(x[n], {name: leaf[n] for name, leaf in leaves.items()}, inputs)
                for n in range(len(x))
            ]
            x = jnp.asarray(np.stack(layers), jnp.float32)
        plain[path] = x
    assert len(flat) > len(plain) + 8
    loss, batch = stage_loss(system, train=False), batch_of(made)
    value = jax.jit(lambda params: loss(params, batch, None)[0])
    adapted, wanted = value(rules.unflatten(flat)), value(rules.unflatten(plain))
    assert abs(adapted - value(moved_without(flat))) > 1e-3
    np.testing.assert_allclose(adapted, wanted, rtol=2e-6)
    split = [
        rules.unflatten({p: x for p, x in flat.items() if lora.is_adapter(p) == low})
        for low in (False, True)
    ]
    merged = rules.flatten(lora.merge(*split))
    for path, x in plain.items():
        np.testing.assert_allclose(merged[path], x, atol=2e-6)


def moved_without(flat):
    return rules.unflatten({path: x for path, x in flat.items() if not lora.is_adapter(path)})


def test_dropout_is_of_training_alone():
    made = small(dropout=0.5)
    system = System.build(made)
    params, batch = rules.unflatten(moved(system)), batch_of(made)
    still = jax.jit(lambda key: stage_loss(system, train=False)(params, batch, key)[0])
    noisy = jax.jit(lambda key: stage_loss(system)(params, batch, key)[0])
    keys = list(jax.random.split(jax.random.key(0), 3))
    assert still(keys[0]) == still(keys[1])
    assert len({float(noisy(key)) for key in keys}) == 3
    x, kept = jnp.ones((4096,)), lora.dropped(jnp.ones((4096,)), jnp.float32(0.25), keys[0])
    assert set(np.unique(kept)) == {0, np.float32(4 / 3)}
    assert abs(float(kept.mean() - x.mean())) < 0.05


def test_no_gradient_flows_through_the_norm_of_dora():
    made = np.random.default_rng(0)
    kernel, x = (jnp.asarray(made.normal(size=s), jnp.float32) for s in ((6, 5), (3, 6)))
    leaves = {
        lora.A: jnp.asarray(made.normal(size=(6, 2)), jnp.float32),
        lora.B: jnp.asarray(made.normal(size=(2, 5)), jnp.float32),
        lora.SCALE: jnp.float32(2.0),
        lora.MAGNITUDE: jnp.asarray(made.normal(size=5), jnp.float32),
    }

    def total(b):
        given = leaves | {lora.B: b}
        return lora.adapted(x, kernel, x @ kernel, given, None).sum()

    norm = np.linalg.norm(kernel + 2 * leaves[lora.A] @ leaves[lora.B], axis=0)
    wanted = 2 * np.outer((x @ leaves[lora.A]).sum(0), leaves[lora.MAGNITUDE] / norm)
    np.testing.assert_allclose(jax.grad(total)(leaves[lora.B]), wanted, rtol=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that trained adapters, killed once on its way."""
    workdir = tmp_path_factory.mktemp("run")
    made = small(targets="llm/layers/attention/.*", dora=True, dropout=0.1)
    loop.fit(made, workdir, stop_after=2)
    loop.fit(made, workdir)
    return made, workdir


def test_a_run_trains_adapters_alone_and_is_found_again(run):
    made, workdir = run
    before = rules.flatten(parameters.parameters(System.build(made)))
    restored = load_run.load_run(workdir)
    after = rules.flatten(restored.params)
    changed = {p for p, x in before.items() if not np.array_equal(x, after[p])}
    assert changed == {
        f"llm/layers/attention/{name}/{leaf}"
        for name in ("qkv", "out")
        for leaf in (lora.A, lora.B, lora.MAGNITUDE)
    }
    kernel = np.float64(before["llm/layers/attention/out/kernel"])
    wanted = np.sqrt((kernel**2).sum((1, 2)))
    drawn = before["llm/layers/attention/out/lora_magnitude"]
    np.testing.assert_allclose(drawn, wanted, rtol=1e-6)
    held = checkpoint.Checkpoints(workdir)._manager.item_metadata(6)
    assert held is None or "kernel" not in str(held["state"])
    stage = parse_stage(json.loads(json.dumps(dataclasses.asdict(made))))
    assert stage.lora == made.lora


def test_a_run_that_began_with_adapters_is_found_with_those_that_it_trained(run, tmp_path):
    made, workdir = run
    again = tmp_path / "again"
    shutil.copytree(workdir / "final", again / "final")
    file = again / "final" / "about.json"
    said = json.loads(file.read_text())
    said["stage"]["lora"]["init"] = str(tmp_path / "gone")
    file.write_text(json.dumps(said))
    ours, theirs = (rules.flatten(load_run.load_run(path).params) for path in (again, workdir))
    path = "llm/layers/attention/qkv/lora_b"
    np.testing.assert_array_equal(ours[path], theirs[path])
    assert made.lora.init == ""


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Folder of a base and of a run on it."""
    folder = tmp_path_factory.mktemp("beside")
    plain = small_stage.stage()
    made = small(targets="llm/layers/attention/.*")
    params = parameters.parameters(System.build(plain))
    checkpoint.save_base(folder / "base", params, {"stage": {"init": {}}})
    made.init, made.steps, made.save_every = {"llm": str(folder / "base")}, 2, 2
    loop.fit(made, folder / "run")
    return folder


def test_a_run_on_a_base_leaves_its_adapters_and_where_the_rest_lies(beside):
    held = checkpoint.open_leaves(beside / "run" / "final")
    assert held and all(map(lora.is_adapter, held))
    base = rules.flatten(parameters.parameters(System.build(small_stage.stage())))
    found = rules.flatten(load_run.load_run(beside / "run").params)
    for path, x in base.items():
        np.testing.assert_array_equal(found[path], x)
    assert np.abs(found["llm/layers/attention/qkv/lora_b"]).max() > 0
    np.testing.assert_array_equal(
        found["llm/layers/attention/qkv/lora_b"],
        held["llm/layers/attention/qkv/lora_b"].read().result(),
    )


@pytest.mark.parametrize("name", ["run", "run/final"])
def test_a_stage_takes_base_and_adapters_from_such_a_run(beside, name):
    made = small(targets="llm/layers/attention/.*", trains=False)
    made.trainable, made.init = (r"llm/final_norm/.*",), {"llm": str(beside / name)}
    ours = rules.flatten(parameters.parameters(System.build(made)))
    theirs = rules.flatten(load_run.load_run(beside / "run").params)
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x)
    origins = parameters.origins(made.init, ours)
    assert origins["llm/layers/attention/qkv/lora_b"][0] == beside / "run" / "final"
    assert origins["llm/layers/attention/qkv/kernel"][0] == beside / "base"
    made.lora = small(targets="llm/layers/attention/qkv", trains=False).lora
    with pytest.raises(UserError, match=r"does not name, llm/layers/attention/out/lora_a"):
        parameters.parameters(System.build(made))
    made.lora = Lora()
    with pytest.raises(UserError, match="has adapters"):
        parameters.parameters(System.build(made))


def test_a_third_run_goes_on_from_the_second(beside, tmp_path):
    """Each one's result is small; the base is that of the first."""
    made = small(targets="llm/layers/attention/.*")
    made.init, made.steps, made.save_every = {"llm": str(beside / "run")}, 1, 1
    loop.fit(made, tmp_path / "next")
    assert all(map(lora.is_adapter, checkpoint.open_leaves(tmp_path / "next" / "final")))
    first, last = (
        rules.flatten(load_run.load_run(path).params)
        for path in (beside / "run", tmp_path / "next")
    )
    changed = {path for path, x in first.items() if not np.array_equal(x, last[path])}
    assert changed and all(map(lora.is_adapter, changed))


def test_such_a_run_is_refused_over_another_base(beside, tmp_path):
    shutil.copytree(beside / "run", tmp_path / "run")
    flat = rules.flatten(parameters.parameters(System.build(small_stage.stage())))
    path = "llm/layers/attention/qkv/kernel"
    other = rules.unflatten(flat | {path: flat[path] + 1e-3})
    checkpoint.save_base(tmp_path / "base", other, {"stage": {"init": {}}})
    file = tmp_path / "run" / "final" / "about.json"
    said = file.read_text().replace(str(beside / "base"), str(tmp_path / "base"))
    file.write_text(said)
    with pytest.raises(UserError, match=rf"init\.llm: .* is of another base: {path} has other"):
        load_run.load_run(tmp_path / "run")
    file.write_text(said.replace(str(tmp_path / "base"), "base"))
    with pytest.raises(UserError, match="of another base"):  # found beside the run
        load_run.load_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(UserError, match="base: no base or finished run here"):
        load_run.load_run(tmp_path / "run")


def test_such_a_run_is_merged_with_the_base_that_it_names(beside, tmp_path):
    said = adapters_out.merge(beside / "run", tmp_path / "merged")
    assert said == "2 kernels of llm with their adapters in them"
    merged, run = checkpoint.open_leaves(tmp_path / "merged"), load_run.load_run(beside / "run")
    assert not any(map(lora.is_adapter, merged))
    flat, place = rules.flatten(run.params), "llm/layers/attention/qkv"
    leaves = {name: flat[f"{place}/{name}"] for name in lora.LEAVES if f"{place}/{name}" in flat}
    for layer in range(2):
        low = {name: x[layer] for name, x in leaves.items()}
        wanted = by_hand(flat[f"{place}/kernel"][layer], low, 1)
        found = merged[f"{place}/kernel"][layer].read().result()
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    shutil.rmtree(tmp_path / "merged")


def test_adapters_go_into_a_further_stage_where_they_stay_as_they_are(run):
    _, workdir = run
    made = small(targets="llm/layers/attention/.*", dora=True, trains=False)
    made.trainable, made.lora.init = (r"llm/final_norm/.*",), str(workdir)
    system = System.build(made)
    assert not any(map(lora.is_adapter, system.trainable))
    ours, theirs = parameters.parameters(system), load_run.load_run(workdir).params
    path = "llm/layers/attention/qkv/lora_b"
    np.testing.assert_array_equal(rules.flatten(ours)[path], rules.flatten(theirs)[path])
    made.lora.rank = 8
    with pytest.raises(UserError, match=r"lora\.rank: is 8, and .*lora\.init names have 4"):
        parameters.parameters(System.build(made))


def test_adapters_of_interfaces_train_too():
    """Nothing of an interface with adapters is taken for frozen."""
    from xllm_jax.configs import stage2_image

    made = stage2_image.get_config("tiny")
    made.trainable, made.init = (), {}
    made.lora = Lora(rank=2, targets=r"image_interface/qformer/.*attention/.*")
    system = System.build(made)
    paths = {path.split("/")[0] for path in system.trainable}
    assert paths == {"image_interface"} and system.model.frozen["image"] == 1
    assert all(map(lora.is_adapter, system.trainable))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"targets": "llm/layers/atention/.*"}, "lora.targets.*matches no kernel.*Nearest kernel"),
        ({"targets": "llm/embedding"}, "lora.targets.*matches no kernel"),
        ({"rank": 0}, "lora.rank"),
        ({"targets": ""}, "lora.targets"),
    ],
)
def test_what_cannot_be_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        _ = System.build(small(**settings)).tree


def test_constants_of_adapters_never_train():
    made = small(dropout=0.1)
    made.trainable = ("llm/layers/.*",)
    tree = System.build(made).tree
    paths = rules.flatten(adapters.split(made, tree)[0])
    assert "llm/layers/attention/qkv/lora_a" in paths
    assert not [path for path in paths if path.endswith(("lora_scale", "lora_dropout"))]


def test_meshes_and_the_hosts_memory_change_nothing():
    paths = f"{small_stage.ROOT}:{small_stage.ROOT / 'tests'}"
    environment = virtual_devices.environment(4) | {"PYTHONPATH": paths}
    done = forked.run(
        [sys.executable, "tests/lora_mesh_check.py"],
        capture_output=True,
        text=True,
        cwd=small_stage.ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for loss, gradient in json.loads(done.stdout.splitlines()[-1]).values():
        assert loss < 1e-6 and gradient < 1e-5


def test_the_step_keeps_no_gradient_of_what_is_frozen():
    made = small()
    like = Trainer(System.build(made)).abstract_state
    assert all(map(lora.is_adapter, rules.flatten(like.trainable)))
    frozen = rules.flatten(like.frozen)
    assert {str(x.dtype) for path, x in frozen.items() if lora.is_adapter(path)} == {"float32"}
