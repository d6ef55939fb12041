"""Tables of several seeds: their numbers, their place in the pages, and the hash they carry."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xllm_jax.report import spread, tables

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import demo_behavior  # noqa: E402
import demo_seeds  # noqa: E402

TITLES = {goal.measure: goal.title for goal in tables.GOALS}
VQA, CER = TITLES["vqa@after"], TITLES["sentences@asr"]
INIT = tables.CLAIMS[0].title
RUNS = {0: {VQA: 0.80, CER: 0.04, INIT: -0.1}, 1: {VQA: 0.90, CER: 0.05, INIT: 0.2}}
RUNS |= {2: {VQA: 1.00, CER: 0.12, INIT: 0.5}}


def program(factor: float, name: str) -> str:
    """StableHLO of a small function that calls another one of the given name."""

    def inner(x):
        return jnp.sin(x) * factor

    inner.__name__ = name
    called = jax.jit(inner)
    return jax.jit(lambda x: {f"{name}_result": called(x) + called(2 * x)}).lower(1.0).as_text()


def test_names_do_not_change_a_program_and_numbers_do():
    first, renamed, other = program(2, "first"), program(2, "renamed"), program(3, "first")
    assert first != renamed
    assert demo_behavior.nameless(first) == demo_behavior.nameless(renamed)
    assert demo_behavior.nameless(first) != demo_behavior.nameless(other)


def test_runs_of_the_same_code_are_kept_and_of_another_are_not():
    known = {"hash": "a", "runs": {"2": {VQA: 0.2}, "10": {VQA: 0.1}}}
    made = {"2": {VQA: 0.9}, "3": {VQA: 0.3}}
    found = demo_seeds.merged(known, "a", made)
    assert list(found) == ["2", "3", "10"] and found["2"] == {VQA: 0.9}
    assert demo_seeds.merged(known, "b", made) == demo_seeds.merged(None, "b", made) == made


def test_settings_count_unless_they_change_no_figure():
    stage = demo_behavior.stage("stage2_image")
    quiet = dataclasses.replace(stage, log_every=7, save_every=9, name="another")
    steeper = dataclasses.replace(stage, optimizer=dataclasses.replace(stage.optimizer, peak=1.0))
    assert demo_behavior.fields(stage) == demo_behavior.fields(quiet)
    assert demo_behavior.fields(stage) != demo_behavior.fields(steeper)
    half = demo_behavior.stage("stage2_image_half")
    fresh = demo_behavior.stage("stage2_image_no_init")
    assert fresh.init["image_interface"] == "" and fresh.steps == half.steps
    assert fresh.data == half.data
    assert {source.share for source in half.data.sources.values()} == {0.5}
    assert half.steps == stage.steps // 2


def test_arrays_differ_by_whole_numbers_and_not_by_the_last_bits_of_others():
    sound = np.linspace(-1.03, 1, 50, dtype=np.float32)
    ids = np.arange(5, dtype=np.int32)
    assert demo_behavior.told(sound) == demo_behavior.told(sound * np.float32(1 + 1e-6))
    assert demo_behavior.told(sound) != demo_behavior.told(sound * np.float32(1.05))
    assert demo_behavior.told(ids) != demo_behavior.told(ids + (ids == 4))


def test_what_is_normalized_has_no_mean_but_noise():
    """One machine said -3.84e-09 where another had said something else, and the hash changed."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4, 200)).astype(np.float32)
    features -= features.mean()
    above, below = features + np.float32(4e-7), features - np.float32(4e-7)
    assert demo_behavior.told(above) == demo_behavior.told(below) == demo_behavior.told(features)
    assert demo_behavior.told(features) != demo_behavior.told(features + np.float32(0.02))
    flat = np.zeros(5, np.float32)
    assert demo_behavior.told(flat) == demo_behavior.told(-flat) != demo_behavior.told(flat + 1)


def test_all_backbones_count():
    names = {name.split("/")[0] for name, _ in demo_behavior.backbones()}
    assert names == {"bert", "blip2_stage2", "image_decoder", "llm", "vision_encoder"}


def test_the_pages_carry_the_hash_of_this_code():
    found = [demo_seeds.stated(page.read_text("utf-8")) for page in demo_seeds.PAGES]
    assert [len(hashes) for hashes in found] == [1, 1] and found[0] == found[1]
    known = spread.recorded()
    if found[0] == ["none"]:
        assert known is None
        return
    assert known and [known["hash"]] == found[0]
    if known["jax"] != jax.__version__:
        pytest.skip(f"StableHLO of JAX {known['jax']} is known, not of {jax.__version__}")
    # In a process of its own: programs are those of the demo, not with the settings of the tests.
    own = {name: x for name, x in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    command = [sys.executable, str(ROOT / "benchmarks" / "demo_behavior.py")]
    environment = own | {"PYTHONPATH": str(ROOT)}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert made.stdout.strip() == known["hash"]


def test_a_table_takes_the_place_of_the_one_before():
    made = demo_seeds.block(RUNS, "abc")
    page = f"# Head\n\n{demo_seeds.block({0: RUNS[0]}, 'none')}\n\nTail\n"
    changed = demo_seeds.placed(page, made)
    assert changed == f"# Head\n\n{made}\n\nTail\n" and demo_seeds.stated(changed) == ["abc"]
    with pytest.raises(ValueError, match="0 tables"):
        demo_seeds.placed("# Head\n", made)


def test_values_are_those_of_goals_and_claims(tmp_path):
    measured = {"vqa@after": {"metrics": {"accuracy": {"value": 0.8}, "other": {"value": 0.1}}}}
    compared = {"init_cider": {"value": -0.2}, "another": {"value": 3.0}}
    report = {"measures": measured, "comparisons": compared}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert spread.values(tmp_path) == {VQA: 0.8, INIT: -0.2}


def test_intervals_over_runs_are_students():
    # 4.302653 is the 97.5 % point of Student's t with two degrees of freedom.
    assert spread.mean_interval(np.array([1.0, 2.0, 3.0])) == pytest.approx(
        (2, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6
    )


def test_a_table_over_runs_counts_those_that_meet_a_goal():
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in spread.table(RUNS).rows}
    assert rows == {
        CER: ["7.0 [-3.8, 17.8]", "4.0", "12.0", "≤ 5 %", "2 of 3"],
        VQA: ["90.0 [65.2, 114.8]", "80.0", "100.0", "≥ 88 %", "2 of 3"],
        INIT: ["0.20 [-0.55, 0.95]", "-0.10", "0.50", "> 0", "2 of 3"],
    }


def test_one_line_says_where_a_run_lies():
    known = {"hash": "f" * 64, "runs": RUNS}
    line = spread.place({VQA: 0.85, CER: 0.2, INIT: 0.0}, known)
    assert line.startswith("2 of 3 rows lie within the recorded runs (3 seeds, code ffffffffffff)")
    assert line.endswith(f"outside: {CER}")
    assert "No runs" in spread.place({VQA: 0.85}, None)


# Flags of two commands do not fit into one process, and nothing is trained here.
STANDING_IN = """
import json, sys
from pathlib import Path
from absl import flags
from xllm_jax.launch import demo

def run_all(jobs, folder, slots):
    trained = [job for job in jobs if job.command == "train"]
    seeds = {[a for a in job.arguments if "seed" in a][:1] == [] for job in trained}
    world = [a for job in jobs for a in job.arguments if a.endswith("world") and "output" in a]
    print(folder.name, seeds, world, sorted(p.name for p in folder.iterdir() if p.is_symlink()))
    entry = {"value": 0.5 + 0.1 * len(folder.name)}
    report = {"measures": {"vqa@after": {"metrics": {"accuracy": entry}}}, "comparisons": {}}
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "report.txt").write_text("told")
    return {}

demo.run_all = run_all
flags.FLAGS(["demo", *sys.argv[1:]])
demo.main([])
"""


def test_seeds_have_folders_of_their_own_and_one_world(tmp_path):
    output = tmp_path / "made"
    told = forked.run(
        [sys.executable, "-c", STANDING_IN, f"--output={output}", "--seeds=2"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert told[0] == "made {True} ['--output=world'] []"
    assert "seed-1 {False} ['--output=../world'] ['bases', 'cache', 'world']" in told
    assert (output / "seed-1" / "world").readlink() == Path("../world")
    assert f"{VQA}" in (output / "seeds.txt").read_text("utf-8")


TIMED = """
import subprocess, sys, time
from xllm_jax.launch import jobs

def running(code):
    made = jobs.Running.__new__(jobs.Running)
    made.computed, made.process = 0.0, subprocess.Popen([sys.executable, "-c", code])
    return made

busy = running("import time\\nwhile time.process_time() < 1: pass")
idle = running("import time; time.sleep(0.1)")
while not all([idle.ended(), busy.ended()]):
    time.sleep(0.05)
print(busy.computed, idle.computed)
"""


def test_a_step_is_told_the_seconds_of_a_core_that_it_took_and_no_others():
    done = subprocess.run([sys.executable, "-c", TIMED], capture_output=True, text=True, check=True)
    busy, idle = map(float, done.stdout.split())
    assert 1 <= busy < 2 and idle < 0.5
