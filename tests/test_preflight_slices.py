"""The preflight of several slices: devices, meshes, and what crosses between slices."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
from small_stage import ROOT
from test_preflight import PROGRAM

from xllm_jax.configs import stage2_image
from xllm_jax.core.errors import UserError
from xllm_jax.preflight import collectives, forecast, hlo, memory, report, roofline, targets

HANDED = (
    "is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="
    '"xla_megascale_runtime",_xla_megascale_target=%s,_xla_megascale_transfer_type="%s"}'
)
# What the TPU compiler made of sums and gathers over four slices of four chips each: the hosts take
# over what leaves a slice, and everything else stands in the program of one slice.
SLICED = f"""\
HloModule jit_step, is_scheduled=true, num_partitions=4

ENTRY %main (a: bf16[256,1024]) -> bf16[1024,1024] {{
  %a = bf16[256,1024]{{1,0}} parameter(0)
  %start = token[] after-all()
  %inside = bf16[1024,1024]{{1,0}} all-gather(%a), channel_id=8, replica_groups={{{{0,1,2,3}}}}
  %send.1 = (bf16[256,1024]{{1,0}}, u32[], token[]) send(%a, %start), channel_id=2, \
{HANDED % ('"{1,2,3,4}x{0:3}"', "ALL_REDUCE")}
  %recv.1 = (bf16[256,1024]{{1,0}}, u32[], token[]) recv(%start), channel_id=1, \
{HANDED % ('"{1,2,3,4}x{0:3}"', "ALL_REDUCE")}
  %recv.2 = (bf16[2,256,1024]{{2,1,0}}, u32[], token[]) recv(%start), channel_id=3, \
{HANDED % ("{{100000,200000},{100001,200001}}", "ALL_GATHER")}
  %done.1 = (bf16[256,1024]{{1,0}}, token[]) recv-done(%recv.1), channel_id=1
  ROOT %result = bf16[1024,1024]{{1,0}} copy(%inside)
}}
"""


def test_what_hosts_exchange_is_counted_apart():
    found = collectives.find(hlo.parse(SLICED), 4)
    between = {one.kind: one for one in found if one.between}
    assert [one.kind for one in found if not one.between] == ["all-gather"]
    part = 256 * 1024 * 2
    assert between["all-reduce"].sent == 2 * 3 / 4 * part  # a ring of four slices
    assert between["all-gather"].sent == part  # its half, of two


def test_groups_that_span_slices_leave_them():
    program = hlo.parse(PROGRAM)  # gathers among all eight, sums among the first four
    leaves = {
        one.kind: one.between for one in collectives.find(program, 8, [0, 0, 0, 0, 1, 1, 1, 1])
    }
    assert leaves == {"all-gather": True, "all-reduce": False}
    assert not any(one.between for one in collectives.find(program, 8))


def test_pairs_of_a_permutation_leave_a_slice():
    text = PROGRAM.replace(
        "all-gather(%layer), channel_id=7, replica_groups=[1,8]<=[8]",
        "collective-permute(%layer), channel_id=7, source_target_pairs={{0,4},{4,0}}",
    )
    for slices, leaves in (((0, 0, 0, 0, 1, 1, 1, 1), True), ((0, 0, 1, 1, 0, 0, 1, 1), False)):
        found = {one.kind: one.between for one in collectives.find(hlo.parse(text), 8, slices)}
        assert found["collective-permute"] == leaves


def sliced(axes: dict[str, int], name: str = "h200:8"):
    """The stage over several slices, and the target that the plan gets."""
    stage = dataclasses.replace(stage2_image.get_config("tiny"), slices=axes)
    return stage, targets.repeated(targets.parse(name), axes)


def test_slices_multiply_the_chips_and_the_axis():
    stage, target = sliced({"data": 2})
    made = targets.make_mesh({"fsdp": -1}, stage.slices, target, compiles=False)
    assert (target.chips, target.title) == (16, "2 x h200:8")
    assert dict(made.shape) == {"data": 2, "fsdp": 8, "tensor": 1}
    assert targets.repeated(target, stage.slices) == target
    assert targets.repeated(target, {}).chips == 8


@pytest.mark.parametrize("axes", [{"tensor": 2}, {"data": 0}])
def test_slices_that_cannot_be(axes):
    with pytest.raises(UserError, match="slices"):
        targets.repeated(targets.parse("v5e:4x4"), axes)


def test_the_network_can_be_the_limit():
    two = dataclasses.replace(targets.parse("v5e:2x2"), slices=2)
    gigabyte = 10**9
    line = roofline.estimate(two, 0.0, 0.0, gigabyte, gigabyte)
    assert line.limit == "network" and line.seconds == pytest.approx(0.32)  # 25 Gbit/s a chip
    assert line.links == pytest.approx(1 / 90)  # two links of 45 GB/s
    used = memory.Memory(1, 1, 1, 1, 1)
    stage, _ = sliced({"data": 2})
    found = tuple(collectives.find(hlo.parse(SLICED), 4))
    page = report.text(
        forecast.Forecast(stage, two, {}, used, True, True, 1.0, 1.0, collectives=found), None, None
    )
    assert "2 x v5e:2x2, 8 chips" in page and "between slices 0.4" in page
    assert page.index("collectives") < page.index("of slices     all-gather: 1")


def test_the_compiler_knows_several_slices():
    pytest.importorskip("libtpu")
    code = (
        "from xllm_jax.preflight import targets as t\n"
        "two = t.repeated(t.parse('v5e-4'), {'data': 2})\n"
        "made = t.make_mesh({'fsdp': -1}, {'data': 2}, two)\n"
        "print([[d.slice_index for d in row] for row in made.devices[:, :, 0]])"
    )
    flags = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **flags, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.stdout.split("\n")[-2] == "[[0, 0, 0, 0], [1, 1, 1, 1]]", done.stderr
