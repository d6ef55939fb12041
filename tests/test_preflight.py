"""The preflight: FLOPs against closed formulas, compiled text read right, mistakes told."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import forked
import jax
import jax.numpy as jnp
import pytest
from small_stage import ROOT

from xllm_jax.configs import stage2_image, stage3_instruction
from xllm_jax.core import flops, rules
from xllm_jax.core.errors import UserError
from xllm_jax.core.lora_settings import Lora
from xllm_jax.core.stage import Part
from xllm_jax.models import quantized
from xllm_jax.preflight import (
    collectives,
    forecast,
    hlo,
    memory,
    micro_batch,
    report,
    roofline,
    targets,
)

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%body.1 (p.1: (s32[], f32[8,4], f32[28,8,4])) -> (s32[], f32[8,4], f32[28,8,4]) {
  %p.1 = (s32[], f32[8,4]{1,0}, f32[28,8,4]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%p.1), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p.1), index=1
  %stack = f32[28,8,4]{2,1,0} get-tuple-element(%p.1), index=2
  %one = s32[] constant(2)
  %next = s32[] add(%counter, %one)
  %layer = f32[8,4]{1,0} fusion(%stack, %counter), kind=kLoop, calls=%slice.1
  %gathered = f32[64,4]{1,0} all-gather(%layer), channel_id=7, replica_groups=[1,8]<=[8]
  ROOT %result = (s32[], f32[8,4]{1,0}, f32[28,8,4]{2,1,0}) tuple(%next, %layer, %stack)
}

%slice.1 (q.0: f32[28,8,4], q.1: s32[]) -> f32[8,4] {
  %q.0 = f32[28,8,4]{2,1,0} parameter(0)
  %q.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %taken = f32[1,8,4]{2,1,0} dynamic-slice(%q.0, %q.1, %zero, %zero)
}

%condition.1 (c.1: (s32[], f32[8,4], f32[28,8,4])) -> pred[] {
  %c.1 = (s32[], f32[8,4]{1,0}, f32[28,8,4]{2,1,0}) parameter(0)
  %count = s32[] get-tuple-element(%c.1), index=0
  %bound = s32[] constant(28)
  ROOT %less = pred[] compare(%count, %bound), direction=LT
}

ENTRY %main (a: (s32[], f32[8,4], f32[28,8,4])) -> f32[8,4] {
  %a = (s32[], f32[8,4]{1,0}, f32[28,8,4]{2,1,0}) parameter(0)
  %loop = (s32[], f32[8,4]{1,0}, f32[28,8,4]{2,1,0}) while(%a), condition=%condition.1, body=%body.1
  %y = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = f32[8,4]{1,0} all-reduce(%y), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_collectives_in_loops_count_as_often_as_they_run():
    found = {one.kind: one for one in collectives.find(hlo.parse(PROGRAM), 8)}
    gather, reduce = found["all-gather"], found["all-reduce"]
    assert (gather.times, gather.in_loop, gather.size) == (14, True, 64 * 4 * 4)
    assert gather.sent == gather.size * 7 / 8
    assert (reduce.times, reduce.in_loop, reduce.sent) == (1, False, 2 * 3 / 4 * 128)


def test_traffic_counts_the_layer_and_not_the_stack():
    layer = 8 * 4 * 4
    loop = 14 * (4 + layer + layer + 4 * 3 + 8 * layer + layer)  # slice, counter, gather
    assert roofline.traffic(hlo.parse(PROGRAM)) == loop + 2 * layer


def test_flops_of_loops_and_gradients():
    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32)
    x = jax.ShapeDtypeStruct((3, 16), jnp.float32)

    def run(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    once = 5 * 2 * 3 * 16 * 16
    assert flops.measured(run, weights, x) == once
    assert flops.measured(jax.grad(run, argnums=1), weights, x) == 2 * once
    assert flops.minimum(lambda x, w: run(w, x), x, weights) == 2 * once
    # The first layer's input needs no gradient; in a loop it counts like the others.
    assert flops.minimum(run, weights, x) == pytest.approx(3 * once)


def test_a_step_with_options_of_the_compiler_is_counted():
    options = {"xla_embed_ir_in_executable": True}
    run = jax.jit(lambda a, b: a @ b, compiler_options=options)
    assert flops.measured(run, jnp.ones((2, 3)), jnp.ones((3, 5))) == 2 * 2 * 3 * 5


def test_flops_of_a_convolution():
    x, kernel = jnp.zeros((2, 10, 4)), jnp.zeros((3, 1, 4))

    def convolve(x, kernel):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), "SAME", dimension_numbers=numbers, feature_group_count=4
        )

    assert flops.measured(convolve, x, kernel) == 2 * 2 * 10 * 4 * 3


@pytest.fixture(scope="module")
def image():
    """FLOPs of stage 2, image, at the real size."""
    stage = stage2_image.get_config("real")
    return stage, forecast.counts(forecast.prepare(stage, targets.parse("h200:8")))


def needed(rows: int, length: int, answers: int) -> float:
    """Closed formula of stage 2, image: frozen ViT 2, frozen LLM 4, Q-Former and adapter 6."""
    blocks, words = 28 * 12 * 4096**2, 130528 * 4096
    llm = 2 * blocks * length + 28 * 4 * length**2 * 4096
    llm_back = 2 * blocks * length + 28 * 8 * length**2 * 4096
    head = 2 * 2 * words * answers
    vit = 39 * (2 * 257 * (4 * 1408**2 + 2 * 1408 * 6144) + 4 * 257**2 * 1408)
    vit += 2 * 256 * 3 * 14**2 * 1408
    own = 12 * (2 * 32 * (4 * 768**2 + 2 * 768 * 3072) + 4 * 32**2 * 768)
    cross = 6 * (2 * 32 * 2 * 768**2 + 4 * 32 * 257 * 768 + 2 * 257 * 2 * 1408 * 768)
    adapter = 2 * 32 * 768 * 4096
    return rows * (llm + llm_back + head + vit + 3 * (own + cross + adapter))


def test_the_minimum_is_the_closed_formula(image):
    stage, found = image
    assert found["minimum"] == pytest.approx(
        needed(stage.data.rows, stage.data.length, stage.data.answers), rel=0.01
    )


def test_the_real_step_does_no_work_it_need_not(image):
    _, found = image
    assert found["minimum"] <= found["flops"] <= 1.05 * found["minimum"]


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("v5e-16", "v5e:4x4", 16),
        ("v5p-8", "v5p:2x2x1", 4),
        ("v4-32", "v4:2x2x4", 16),
        ("h200:8", "h200:8", 8),
    ],
)
def test_names_of_slices(text, name, chips):
    target = targets.parse(text)
    assert (target.name, target.chips) == (name, chips)


def test_the_compiler_knows_every_kind_of_slice():
    pytest.importorskip("libtpu")
    code = (
        "from xllm_jax.preflight import targets as t\n"
        "print([len(t.devices(t.parse(n))) for n in ('v4-32', 'v5e-1', 'v5p-8', 'v6e-8')])"
    )
    flags = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **flags, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.stdout.split("\n")[-2] == "[16, 1, 4, 8]", done.stderr


@pytest.mark.parametrize("text", ["v9:2x2", "v5e", "v5e:4x4x4", "v4-24"])
def test_slices_that_do_not_exist(text):
    with pytest.raises(UserError, match="--topology"):
        targets.parse(text)


def test_a_larger_micro_batch_keeps_the_update():
    made = micro_batch.with_rows(stage2_image.get_config("real"), 128)
    assert (made.data.rows, made.data.examples, made.optimizer.accumulation) == (128, 128, 4)


def test_search_takes_the_largest_that_fits_in_few_tries():
    stage, target, tried = stage2_image.get_config("real"), targets.parse("h200:8"), []

    def compile_(made, target):
        rows = micro_batch.rows(made)
        tried.append(rows)
        used = memory.Memory(0, 50 * 10**9, 0, 0, rows * 10**9)
        fits = used.total <= target.chip.memory
        return forecast.Forecast(made, target, {}, used, fits, True, 1.0, 1.0)

    found = forecast.largest(stage, target, compile_=compile_)
    assert micro_batch.rows(found.stage) == 64
    assert tried == [512, 64]
    whole = micro_batch.with_rows(stage, 512)
    assert forecast.largest(whole, target, compile_(whole, target), compile_).stage == found.stage
    assert tried == [512, 64, 512, 64]  # the plan that is known costs no third 512


def test_moments_are_sharded_as_their_parameters():
    stage = stage2_image.get_config("real")
    lowered = forecast.prepare(
        dataclasses.replace(stage, mesh={"fsdp": 8}), targets.parse("h200:8")
    )
    trainable = memory.held(lowered.state.trainable)
    # Two moments and the accumulated gradient, and a few counters.
    assert memory.held(lowered.state.optimizer) == pytest.approx(3 * trainable, rel=1e-4)


def test_a_llama_with_adapters_and_packed_kernels_is_counted():
    stage = stage2_image.get_config("real")
    before = memory.held(forecast.prepare(stage, targets.parse("h200:1")).state.trainable)
    stage.parts["llm"] = Part("causal.Causal", "vicuna_7b", weights="nf4")
    stage.data.llm_family, stage.data.template = "causal", "plain"
    stage.lora = Lora(rank=16, targets="llm/layers/attention/.*")
    state = forecast.prepare(stage, targets.parse("h200:1")).state
    depth, width, hidden = 32, 4096, 11008
    # Queries, keys, values and what leads out of the heads: A and B of each, in float32.
    adapters = 4 * depth * 4 * 16 * 2 * width
    assert memory.held(state.trainable) == before + adapters
    kernels = depth * (4 * width * width + 3 * width * hidden)
    frozen = {path: memory.held({"x": x}) for path, x in rules.flatten(state.frozen).items()}
    packed = sum(size for path, size in frozen.items() if quantized.is_packed(path))
    assert packed == kernels * 4.5 / 8  # four bits, and 16 of a scale for 64 of them
    assert not [path for path in frozen if path.startswith("llm") and path.endswith("kernel")]


def run(*arguments, folder):
    return forked.run(
        [sys.executable, "launch/preflight.py", f"--output={folder}", "--nosearch", *arguments],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip


def test_the_command_writes_a_page_and_fails_where_it_does_not_fit(tmp_path):
    config = "--config=configs/stage3_instruction.py"
    done = run(config, "--topology=a100:1", "--config.data.rows=512", folder=tmp_path)
    assert done.returncode == 1, done.stderr
    written = json.loads((tmp_path / "stage3_instruction_a100_1.json").read_text())
    assert not written["fits"] and written["memory_per_chip"]["total"] > written["chip_memory"]
    page = (tmp_path / "stage3_instruction_a100_1.txt").read_text()
    assert "DOES NOT FIT" in page and "llm/layers/feed_forward" in page
    assert "not looked at" in page


def test_rows_that_do_not_split_are_a_users_mistake(tmp_path):
    done = run(
        "--config=configs/stage3_instruction.py",
        "--topology=h200:8",
        "--config.data.rows=4",
        folder=tmp_path,
    )
    assert done.returncode == 2 and "data.rows" in done.stderr
    assert stage3_instruction.get_config("real").data.rows == 16


def test_a_page_without_a_compiler_says_so(image):
    stage, found = image
    target = targets.parse("h200:8")
    used = memory.Memory(1, 2, 3, 4, 5)
    made = forecast.Forecast(stage, target, {"fsdp": 8}, used, True, False, **found)
    assert "arithmetic, not compiled" in report.text(made, None, None)
