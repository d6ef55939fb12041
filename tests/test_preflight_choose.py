"""The choice for the user: the same update, the best forecast that fits, bounded and remembered."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from small_stage import ROOT

from xllm_jax.configs import stage1_image, stage2_image
from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli
from xllm_jax.preflight import choose, chosen, cycles, forecast, memory, micro_batch, targets

SLICE = targets.parse("v5e:2x2")


@pytest.fixture
def stage(monkeypatch):
    """The miniature, an update of 8 x 2 rows; a row is worth 40 GFLOP, and keeps 1 GiB."""
    made = stage2_image.get_config("tiny")
    made.optimizer.accumulation, made.log_every, made.save_every = 2, 10, 100
    monkeypatch.setattr(choose, "_traced", lambda stage, target: (4e10, float(2**30)))
    return made


@pytest.fixture
def with_compiler(monkeypatch):
    monkeypatch.setattr(choose, "can_compile", lambda target: True)


def compiler(seconds, fits=lambda stage: True):
    """A compiler that gives steps these seconds, and the list of what it was asked for."""
    asked = []

    def compile_(stage, target):
        asked.append(stage)
        count = cycles.Cycles(round(seconds(stage) * target.chip.clock), 0, 0, {}, {})
        used = memory.Memory(1, 1, 1, 1, 1)
        made = forecast.Forecast(stage, target, {}, used, fits(stage), True, 1.0, 1.0)
        return dataclasses.replace(made, cycles=count)

    return compile_, asked


def update(stage):
    return (
        micro_batch.rows(stage) * stage.optimizer.accumulation,
        stage.data.examples * stage.optimizer.accumulation,
    )


def test_every_candidate_is_the_same_update(stage):
    ranked = choose.rank(stage, SLICE)
    assert len(ranked) > 10
    assert {update(one.stage) for one in ranked} == {update(stage)}
    assert {micro_batch.rows(one.stage) for one in ranked} == {4, 8, 16}
    for one in ranked:  # logs after as many examples as before
        factor = one.stage.optimizer.accumulation / 2
        assert (one.stage.log_every, one.stage.save_every) == (10 * factor, 100 * factor)


def test_what_fits_stands_first_and_the_fastest_of_that(stage):
    heavy = dataclasses.replace(SLICE.chip, memory=3 * 2**30)  # 16 rows keep 5.2 GiB a chip
    ranked = choose.rank(stage, dataclasses.replace(SLICE, chip=heavy))
    keys = [(not one.fits, one.seconds) for one in ranked]
    assert keys == sorted(keys) and {one.fits for one in ranked} == {True, False}
    assert {micro_batch.rows(one.stage) for one in ranked if one.fits} == {4, 8}


def test_the_compilers_cycles_decide_among_the_best_few(stage, with_compiler):
    first, second, third, *_ = [one.stage for one in choose.rank(stage, SLICE)]
    order = {id_: n for n, id_ in enumerate(map(repr, (first, second, third)))}
    compile_, asked = compiler(lambda made: (3.0, 1.0, 2.0)[order[repr(made)]])
    found = choose.choose(stage, SLICE, compile_=compile_)
    assert asked == [first, second, third]
    assert found.stage == second and found.compiled == 3
    assert found.seconds == pytest.approx(1.0 * second.optimizer.accumulation)


def test_what_the_compiler_refuses_is_passed_over(stage, with_compiler):
    compile_, asked = compiler(lambda made: 1.0, fits=lambda made: micro_batch.rows(made) < 16)
    found = choose.choose(stage, SLICE, compile_=compile_)
    assert micro_batch.rows(found.stage) < 16 and found.compiled == 3
    assert len(asked) > 3 and micro_batch.rows(asked[0]) == 16


def test_no_compilation_begins_that_would_pass_the_limit(stage, with_compiler):
    now = [0.0]

    def seconds(made):
        now[0] += 250.0
        return 1.0

    compile_, asked = compiler(seconds)
    choose.choose(stage, SLICE, tries=9, limit=600.0, compile_=compile_, clock=lambda: now[0])
    assert len(asked) == 2  # the third would end at 750 s


def test_without_the_compiler_arithmetic_decides_and_says_so(stage, monkeypatch):
    monkeypatch.setattr(choose, "can_compile", lambda target: False)
    found = choose.choose(stage, SLICE, compile_=None)
    assert found.stage == choose.rank(stage, SLICE)[0].stage and found.compiled == 0
    assert micro_batch.rows(found.stage) == 16  # weights are copied once an update
    told = chosen.text(chosen.plain(found, stage, SLICE) | {"kept": False})
    assert "by arithmetic alone" in told and "--config.data.rows=16" in told


def test_kernels_are_packed_only_where_nothing_fits_without(stage, monkeypatch):
    assert not any(one.stage.parts["llm"].weights for one in choose.rank(stage, SLICE))
    monkeypatch.setattr(choose, "can_compile", lambda target: False)
    one = targets.parse("v5e-1")
    state = forecast.prepare(stage, one, compiles=False).state
    held = sum(map(memory.held, (state.trainable, state.frozen, state.optimizer)))
    room = (choose.KERNELS * 2**30 + held - 1000) / choose.ROOM  # for one row, almost
    tight = dataclasses.replace(one, chip=dataclasses.replace(one.chip, memory=int(room)))
    found = choose.choose(stage, tight)
    assert found.stage.parts["llm"].weights == "int8"
    assert "--config.parts.llm.weights=int8" in found.flags
    assert "--config.init.llm=bases/llm_int8" in found.flags
    assert found.notes == (
        "xllm quantize --input=bases/llm --output=bases/llm_int8 --weights=int8 --part=llm",
    )


def test_nothing_fits_is_a_users_mistake(stage):
    none = dataclasses.replace(SLICE, chip=dataclasses.replace(SLICE.chip, memory=1000))
    with pytest.raises(UserError, match="larger slice"):
        choose.choose(stage, none)


def test_a_loss_within_the_micro_batch_keeps_its_rows():
    contrast = stage1_image.get_config("real")
    assert choose.row_choices(contrast, 16) == [contrast.data.examples]
    means = stage2_image.get_config("real")
    assert choose.row_choices(means, 256) == [256, 512]
    means.optimizer.averaging = "micro_batches"
    assert choose.row_choices(means, 16) == [32]


def test_a_row_is_traced_for_its_flops_and_what_is_kept():
    made = stage2_image.get_config("tiny")
    flops, kept = choose._traced(made, SLICE)
    lowered = forecast.prepare(made, SLICE, compiles=False)
    assert flops * made.data.rows == pytest.approx(forecast.counts(lowered)["flops"], rel=0.01)
    whole = memory.residuals(forecast.kept(lowered))
    assert kept * made.data.rows == pytest.approx(whole, rel=0.05)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def choose_(stage, target, rows=0):
        made.append(stage)
        one = micro_batch.with_rows(stage, 16)
        return choose.Choice(one, choose.flags(stage, one), 0.5, 2, 30)

    monkeypatch.setattr(choose, "choose", choose_)
    return made


def test_a_choice_is_kept_for_its_stage_and_slice(stage, cache, tmp_path):
    first = chosen.find(stage, SLICE)
    again = chosen.find(stage, SLICE)
    assert (first.pop("kept"), again.pop("kept")) == (False, True)
    assert first == again and len(cache) == 1
    chosen.find(stage, targets.parse("v5e-1"))
    chosen.find(dataclasses.replace(stage, seed=1), SLICE)
    assert len(cache) == 3
    chosen.find(stage, SLICE, again=True)
    assert len(cache) == 4
    for file in tmp_path.rglob("*.json"):
        file.write_text("[]")  # no choice
    assert not chosen.find(stage, SLICE)["kept"]


def test_the_file_of_flags_makes_the_chosen_stage(stage, cache, tmp_path):
    found = chosen.find(stage, SLICE)
    file = tmp_path / "flags.txt"
    given = ["--config=stage2_image:tiny", "--config.optimizer.accumulation=2"]
    chosen.write(file, given, found)
    lines = cli.with_flag_files(["xllm train", f"--flagfile={file}", "--workdir=w"])
    assert lines[1:] == [*given, *found["flags"], "--workdir=w"]
    code = (
        "import sys; from absl import flags; from ml_collections import config_flags\n"
        "from xllm_jax.launch import cli\n"
        "CONFIG = config_flags.DEFINE_config_file('config')\n"
        "cli.parse(sys.argv); s = CONFIG.value\n"
        "print([s.data.rows, s.data.examples, s.optimizer.accumulation])"
    )
    command = [sys.executable, "-c", code, f"--flagfile={file}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert json.loads(done.stdout) == [16, 48, 1], done.stderr


def test_a_file_of_flags_that_is_not_there_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="--flagfile"):
        cli.with_flag_files(["xllm train", f"--flagfile={tmp_path / 'none'}"])
    (tmp_path / "odd").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="--flagfile"):
        cli.with_flag_files(["xllm train", f"--flagfile={tmp_path / 'odd'}"])
