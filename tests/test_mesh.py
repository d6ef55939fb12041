"""Meshes change nothing but rounding, and devices send each other what they must and no more."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections import Counter

import forked
import jax
import numpy as np
import pytest
import small_stage
import virtual_devices
from mesh_check import COMPARED, COUNTED, OFFLOADED
from small_stage import GLM, ROOT

from xllm_jax.assembly.system import System
from xllm_jax.core import flops, mesh, rules
from xllm_jax.core.errors import UserError
from xllm_jax.data.batching import batch_format
from xllm_jax.preflight import collectives, memory
from xllm_jax.training.trainer import Trainer

DEPTH = GLM["depth"]


@pytest.fixture(scope="module")
def found():
    """What `mesh_check.py` printed on 8 virtual devices."""
    environment = virtual_devices.environment(8) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = forked.run(
        [sys.executable, "tests/mesh_check.py"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("stage", "name"), [(stage, name) for stage, names in COMPARED.items() for name in names]
)
def test_losses_and_gradients_equal_those_of_one_device(found, stage, name):
    loss, gradient = found["stages"][stage][name]
    assert loss < 1e-6 and gradient < 1e-5


def test_parameters_in_the_hosts_memory_change_nothing(found):
    loss, gradient = found["stages"][OFFLOADED]["offloaded"]
    assert loss < 1e-6 and gradient < 1e-5


def copied(jaxpr):
    """Shapes of all that a program copies from the host's memory."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "device_put":
            assert set(equation.params["devices"]) == {jax.memory.Space.Device}
            shapes += [variable.aval.shape for variable in equation.outvars]
        for inside in flops.inner(equation):
            shapes += copied(inside)
    return shapes


def test_layers_in_the_hosts_memory_are_copied_one_by_one():
    made = small_stage.stage(trainable=(r"llm/embedding",))
    made.offload = (r"llm/(layers|final_norm)/.*",)
    trainer = Trainer(System.build(made, mesh.make({})))
    like, step = trainer.abstract_state, trainer.step
    shapes = Counter(
        copied(jax.make_jaxpr(step)(like, batch_format.find(made.data).shapes()).jaxpr)
    )
    width, hidden = GLM["width"], GLM["hidden"]
    assert shapes[width, hidden] == shapes[hidden, width] == 2  # forward and back
    flat = rules.flatten(like.frozen)
    stacks = {x.shape for path, x in flat.items() if re.fullmatch("llm/layers/.*/kernel", path)}
    assert stacks & shapes.keys() == set()


def test_preflight_counts_what_lies_on_the_chip():
    made = small_stage.stage(trainable=(r"llm/final_norm/.*",), offload=(r"llm/layers/.*",))
    like = Trainer(System.build(made, mesh.make({}))).abstract_state
    assert memory.held(like.frozen) == 4 * GLM["vocab"] * GLM["width"]  # the embedding
    assert memory.held(like.trainable) == 4 * 2 * GLM["width"]


def test_what_trains_stays_on_the_chip():
    made = small_stage.stage(offload=(r"llm/.*",))
    with pytest.raises(UserError, match="'llm/final_norm/bias' trains"):
        _ = Trainer(System.build(made, mesh.make({}))).abstract_state


# By kind: in the loop over layers, outside of it. Splitting parameters gathers four kernels a layer
# forward and four back; splitting heads sums the activations twice forward and twice back. Outside
# stand the embedding, the head, the loss and the norm of the gradient. Since jax 0.11, XLA sums one
# scalar apart on one of these meshes, and two together on another.
SCALARS = int(jax.__version_info__ >= (0, 11))
PINNED = {
    "fsdp 8": {
        "all-gather": (8 * DEPTH, 9), "all-reduce": (DEPTH, 6 + SCALARS), "all-to-all": (0, 3)
    },
    "tensor 2": {"all-reduce": (4 * DEPTH, 5)},
    "data 2, fsdp 2, tensor 2": {
        "all-gather": (8 * DEPTH, 9), "all-reduce": (4 * DEPTH + 3 * DEPTH, 10 - SCALARS),
        "all-to-all": (0, 3),
    },
    "data 2 over slices, fsdp 4": {
        "all-gather": (8 * DEPTH, 9), "all-reduce": (3 * DEPTH, 6), "all-to-all": (0, 3)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_collectives_are_those_that_the_mesh_needs(found, name):
    counts = Counter()
    for one in found["collectives"][name]:
        counts[one["kind"], one["in_loop"]] += one["times"]
    kinds = {kind for kind, _ in counts}
    assert {kind: (counts[kind, True], counts[kind, False]) for kind in kinds} == PINNED[name]


@pytest.mark.parametrize("name", COUNTED)
def test_no_weight_stack_is_gathered_whole(found, name):
    gathered = [row for row in found["collectives"][name] if row["kind"] == "all-gather"]
    stack = re.compile(rf"\w+\[{DEPTH},\d+,\d+.*\]")
    assert [row for row in gathered if stack.fullmatch(row["shape"])] == []


@pytest.mark.parametrize("name", ["fsdp 8", "data 2 over slices, fsdp 4"])
def test_every_layer_is_gathered_once_forward_and_once_back(found, name):
    width, hidden = GLM["width"], GLM["hidden"]
    kernels = [(width, 3 * width), (width, width), (width, hidden), (hidden, width)]
    wanted = Counter((f"f32[{rows},{columns}]", DEPTH) for rows, columns in kernels * 2)
    rows = found["collectives"][name]
    gathered = [
        (row["shape"], row["times"]) for row in rows if row["in_loop"] and "gather" in row["kind"]
    ]
    assert Counter(gathered) == wanted


@pytest.mark.parametrize("chunk", ["1", "2"])
def test_chunks_of_rows_share_what_is_gathered(found, chunk):
    def elements(gathered):
        sizes = [(math.prod(map(int, shape[4:-1].split(","))), n) for shape, n in gathered]
        return Counter({size: sum(n for other, n in sizes if other == size) for size, _ in sizes})

    assert elements(found["gathered"][chunk]) == elements(found["gathered"]["0"])


def test_between_slices_go_gradients_alone(found):
    """Each device's share of them: a quarter of the kernels, and norms, biases and scalars."""
    rows = found["collectives"]["data 2 over slices, fsdp 4"]
    crossing = [row for row in rows if any(len({n // 4 for n in g}) > 1 for g in row["groups"])]
    assert crossing == [row for row in rows if row["between"]]
    width, hidden = GLM["width"], GLM["hidden"]
    kernels = 4 * width * width + 2 * width * hidden
    small = 3 * width + width + hidden + width + 2 * 2 * width  # biases and norms of a layer
    layers = [row for row in crossing if row["in_loop"]]
    assert {row["kind"] for row in crossing} == {"all-reduce"}
    assert sum(row["size"] * row["times"] for row in layers) == 4 * DEPTH * (kernels // 4 + small)
    assert sum(row["size"] for row in crossing if not row["in_loop"]) < 4 * (2 * width + 8)


@dataclasses.dataclass(frozen=True)
class Device:
    """A device that says in which slice it lies."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


def numbers(axes, slices, devices):
    made = mesh.make(axes, devices, slices)
    return np.vectorize(lambda device: device.id)(made.devices)[:, :, 0].tolist()


MIXED = [Device(number, number % 2) for number in range(8)]  # even numbers: one slice
ALIKE = [Device(number, 0) for number in range(8)]


@pytest.mark.parametrize(
    ("axes", "slices", "devices", "wanted"),
    [
        ({"fsdp": 4}, {"data": 2}, MIXED, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ({"data": 2, "fsdp": -1}, {"data": 2}, MIXED, [[0, 2], [4, 6], [1, 3], [5, 7]]),
        ({"data": 2, "fsdp": 2}, {"fsdp": 2}, MIXED, [[0, 2, 1, 3], [4, 6, 5, 7]]),
        ({"fsdp": 4}, {"data": 2}, ALIKE, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"data": 2, "fsdp": 2}, {"fsdp": 2}, ALIKE, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ({"data": 2}, {"data": 2, "fsdp": 2}, ALIKE, [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_neighbors_lie_in_one_slice(axes, slices, devices, wanted):
    assert numbers(axes, slices, devices) == wanted


@pytest.mark.parametrize(
    ("axes", "slices", "devices", "message"),
    [
        ({"data": 8}, {}, MIXED, "lie in 2 slices"),
        ({"data": 8}, {"data": 4}, MIXED, "lie in 2 slices"),
        ({"fsdp": -1}, {"data": 3}, ALIKE, "8 devices do not make 3 equal slices"),
        ({"data": 2, "fsdp": 4}, {"data": 2}, ALIKE, "needs 8 devices, there are 4"),
        ({"tensor": 8}, {"tensor": 2}, ALIKE, "'tensor' over 2 slices"),
        ({"data": 8}, {"data": 0}, ALIKE, "'data' over 0 slices"),
    ],
)
def test_slices_that_do_not_fit(axes, slices, devices, message):
    with pytest.raises(UserError, match=message):
        mesh.make(axes, devices, slices)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x={}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1}}", [[0, 1, 2, 3]]),
    ],
)
def test_who_takes_part_in_a_collective(text, wanted):
    assert collectives.groups(text, 4) == wanted
