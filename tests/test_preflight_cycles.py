"""The compiler's cycles: added up as by hand, told by place, and the same as they were stored."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_stage import ROOT

from xllm_jax.configs import stage2_image
from xllm_jax.preflight import cycles, forecast, hlo, memory, report, targets

# A scan over six layers of tanh(x @ w) + x with its gradient to x, as libtpu 0.0.52 compiled it for
# one v5e chip; what is inside of fusions and not looked at is left out.
COMPILED = Path(__file__).with_name("tpu_program.txt")
STORED = {"0.0.52": 872_572}  # {libtpu: cycles of `tpu_cycles_check.py`}

MIXED = """\
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %start = (bf16[8,128]{1,0}, bf16[8,128]{1,0:S(1)}) copy-start(%a), backend_config={"window_config":{"estimated_cycles":"7"}}
  %gathering = bf16[32,128]{1,0} fusion(%a), calls=%gathers, metadata={op_name="jit(step)/jvp(LLM)/layers/dot_general"}, backend_config={"window_config":{"estimated_cycles":"11"}}
  %hidden = bf16[8,128]{1,0} fusion(%a), calls=%computes, metadata={op_name="jit(step)/jvp(LLM)/layers/mul"}, backend_config={"window_config":{"estimated_cycles":"13"}}
  %reduced = bf16[8,128]{1,0} all-reduce(%hidden), to_apply=%sum, backend_config={"window_config":{"estimated_cycles":"17"}}
  ROOT %plain = bf16[8,128]{1,0} copy(%reduced), backend_config={"window_config":{"estimated_cycles":"19"}}
}

%gathers (p: bf16[8,128]) -> bf16[32,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %gathered = bf16[32,128]{1,0} all-gather(%p), replica_groups=[1,4]<=[4]
}

%computes (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %piece = bf16[32,128]{1,0} all-gather(%q), replica_groups=[1,4]<=[4]
  ROOT %product = bf16[8,128]{1,0} multiply(%q, %q)
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def counted():
    return cycles.count(hlo.parse(COMPILED.read_text()))


def test_cycles_of_a_compiled_program_are_those_summed_by_hand(counted):
    # Six turns each: forward a copy, a product and writing what is kept; backward the first two.
    forward, backward = 6 * (2946 + 7012 + 3639), 6 * (2946 + 7012)
    assert counted.core == forward + backward == 141_330
    assert (counted.copies, counted.links) == (0, 0)


def test_places_are_modules_and_sum_to_all(counted):
    assert counted.places == {
        "Model/layers/up": 6 * 7012,
        "Model/layers/up backward": 6 * 7012,
        "Model": 6 * 3639,  # writing into the stack, around the layers
        cycles.UNNAMED: 2 * 6 * 2946,
    }
    assert counted.operations["dot_general"] == 2 * 6 * 7012
    (first, number, share), *_ = counted.most(1)
    assert (first, number) == ("Model/layers/up", 42_072)
    assert share == pytest.approx(42_072 / 141_330)


def test_copies_and_collectives_beside_the_core_are_apart():
    found = cycles.count(hlo.parse(MIXED))
    # A fusion that multiplies is the core's, though a piece of a gathering hides in it.
    assert (found.core, found.copies, found.links) == (13 + 19, 7, 11 + 17)
    assert sum(found.places.values()) == sum(found.operations.values()) == found.core


def test_a_program_without_cycles_has_no_forecast():
    text = COMPILED.read_text().replace("estimated_cycles", "other")
    assert cycles.count(hlo.parse(text)) is None


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("jit(f)/jvp(LLM)/while/body/closed_call/layers/up/dot_general", "LLM/layers/up"),
        ("jit(f)/transpose(jvp(LLM))/while/body/layers/up/mul", "LLM/layers/up backward"),
        ("jit(f)/jvp(LLM)/checkpoint/rematted_computation/layers/add", "LLM/layers backward"),
        ("jit(f)/jvp(LLM)/attention/bqhd,bkhd->bhqk/dot_general", "LLM/attention"),
        ("jit(f)/vmap(jvp(ViT))/layers/sub", "ViT/layers"),
        ("jit(f)/jit(_where)/select_n", cycles.UNNAMED),
        ("", cycles.UNNAMED),
    ],
)
def test_the_place_of_an_operation(source, path):
    assert cycles.place(source) == path


@pytest.fixture
def made(counted):
    """A step of which all but the cycles is made up: 1e12 FLOPs needed on four v5e chips."""
    used = memory.Memory(1, 2, 3, 4, 5)
    stage, target = stage2_image.get_config("real"), targets.parse("v5e:2x2")
    step = forecast.Forecast(stage, target, {"fsdp": 4}, used, True, True, 1.1e12, 1e12)
    return dataclasses.replace(step, cycles=counted, plain=9_557_312)


def test_the_page_and_its_json_tell_the_forecast(made):
    found = report.record(made, None, None)["forecast"]
    seconds = 141_330 / 1.5e9
    assert found["seconds"] == found["on_core"] == pytest.approx(seconds)
    assert found["utilization"] == pytest.approx(1e12 / (4 * 197e12 * seconds))
    assert found["plain_product_share"] == pytest.approx(0.876, abs=1e-3)
    assert found["places"]["Model/layers/up"] == [42_072, 0.2977]
    page = report.text(made, None, None)
    assert "forecast      0.1 ms a micro-step" in page and "reaches 88 %" in page
    assert "29.8 %  Model/layers/up" in page


def test_links_that_take_longer_are_waited_for(made):
    gathering = "ENTRY %main (a: bf16[8]) -> bf16[8] {\n  %a = bf16[8]{0} parameter(0)\n"
    gathering += "  ROOT %g = bf16[400000000]{0} all-gather(%a), replica_groups=[1,4]<=[4]\n}\n"
    sends = tuple(forecast.collectives.find(hlo.parse(gathering), 4))
    slow = dataclasses.replace(made, collectives=sends)
    assert slow.expected == slow.roofline.links > made.expected
    assert "the rest waits for links" in report.text(slow, None, None)


@pytest.fixture(scope="module")
def compiled():
    """What the installed TPU compiler says."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed (pip install -e '.[preflight]')")
    dropped = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    flags = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    done = subprocess.run(
        [sys.executable, "tests/tpu_cycles_check.py"],
        capture_output=True, text=True, cwd=ROOT, env={**kept, **flags, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_tiny_program_costs_what_it_did(compiled):
    version = importlib.metadata.version("libtpu")
    if version not in STORED:
        pytest.skip(f"no cycles are stored for libtpu {version}")
    assert compiled["cycles"] == pytest.approx(STORED[version], rel=0.02)
    assert compiled["places"]["ChatGLM/layers/feed_forward/up"] > 0
    assert compiled["places"]["ChatGLM/layers/feed_forward/up backward"] > 0


def test_a_plain_product_is_near_the_peak_by_the_compilers_cycles(compiled):
    assert 0.8 < cycles.plain_share(compiled["plain"], targets.parse("v5e-1")) < 1.0
