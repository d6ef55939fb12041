"""`--config.data.rows=auto`: the same update, chosen for the devices that are here, and kept."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import types

import forked
import jax
import pytest
import small_searches
import small_stage
import virtual_devices
from absl import flags

from xllm_jax.core import hosts
from xllm_jax.core.errors import UserError
from xllm_jax.launch import auto_rows, auto_value
from xllm_jax.preflight import apart, choose, chosen, here, micro_batch, targets

SLICE = targets.parse("v5e:2x2")


def device(kind, coords=(), slice_index=0, process=0, platform="tpu", limit=0):
    """What JAX says of a device."""
    return types.SimpleNamespace(
        device_kind=kind, coords=coords, slice_index=slice_index, process_index=process,
        platform=platform, memory_stats=lambda: {"bytes_limit": limit} if limit else None,
    )  # fmt: skip


def pod(kind, *shape, slices=1):
    """TPUs of slices of that shape."""
    places = itertools.product(*map(range, (*shape, *[1] * (3 - len(shape)))))
    return [device(kind, place, number) for place in places for number in range(slices)]


@pytest.mark.parametrize(
    ("kind", "shape", "name"),
    [
        ("TPU v5 lite", (4, 4), "v5e-16"),
        ("TPU v5 lite", (2, 4), "v5e-8"),
        ("TPU v5 lite", (4, 2), "v5e-8"),
        ("TPU v5 lite", (1, 1), "v5e-1"),
        ("TPU v5", (2, 2, 1), "v5p-8"),
        ("TPU v4", (2, 2, 2), "v4-16"),
        ("TPU v6 lite", (4, 8), "v6e-32"),
    ],
)
def test_chips_that_are_here_are_the_slice_of_that_name(kind, shape, name):
    assert here.target({}, pod(kind, *shape)) == targets.parse(name)
    both = here.target({"data": 2}, pod(kind, *shape, slices=2))
    assert both == targets.parse(name)  # of each


def test_a_part_of_a_slice_is_counted_and_not_compiled_for(monkeypatch):
    part = here.target({}, pod("TPU v5 lite", 2, 4)[:5])
    assert (part.chips, part.kind, part.shape) == (5, "v5e", (5, 1))

    def refuse(name, *_, **options):
        raise RuntimeError(f"no topology {name}")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", refuse)
    assert not choose.can_compile(part)


def test_cards_have_the_memory_that_they_say():
    cards = [device("NVIDIA H200", platform="gpu", limit=100 * 10**9) for _ in range(8)]
    found = here.target({"data": 2}, cards)
    assert (found.name, found.chips) == ("h200:4", 4)
    assert found.chip.memory == 100 * 10**9 and found.chip.flops == targets.CHIPS["h200"].flops
    other = here.target({}, [device("NVIDIA L4", platform="gpu", limit=20 * 10**9)] * 2)
    assert (other.kind, other.chips, other.chip.memory) == ("local", 2, 20 * 10**9)
    assert not choose.can_compile(other)


def test_a_machines_cores_share_its_memory(tmp_path):
    cores = [device("cpu", platform="cpu", process=n // 4) for n in range(8)]  # of two hosts
    found = here.target({}, cores, memory=lambda one: 64 * 2**30)
    assert (found.chips, found.chip.memory) == (8, 16 * 2**30)
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tmp_path / "none").write_text("max\n")
    (tmp_path / "max").write_text("1073741824\n")
    assert here.machine_memory([str(tmp_path / "none"), str(tmp_path / "gone")]) == whole
    assert here.machine_memory([str(tmp_path / "max")]) == 2**30


def test_devices_that_cannot_be_chosen_for_are_a_users_mistake():
    with pytest.raises(UserError, match="several kinds"):
        here.target({}, [device("NVIDIA H200"), device("NVIDIA L4")])
    with pytest.raises(UserError, match="equal slices"):
        here.target({"data": 3}, pod("TPU v4", 2, 2, 1))


def stage(**changes):
    """An update of 8 x 2 rows."""
    made = small_stage.stage(**changes)
    made.parts["llm"].fields |= {"depth": 1, "width": 16, "hidden": 32}
    made.data.length, made.data.answers = 64, 24
    made.optimizer.accumulation = 2
    return made


def test_a_choice_is_applied_as_its_flags_would():
    configured = stage()
    one = choose.variant(configured, 16, {"data": 2, "fsdp": 2, "tensor": 1}, "all")
    record = chosen.plain(choose.Choice(one, (), 1.0, 2, 30), configured, SLICE)
    assert chosen.apply(configured, json.loads(json.dumps(record))) == one
    assert "--config.data.rows=16" in choose.flags(configured, one)
    for wrong in ({"rows": 8}, {"rows": 0}, {"packed": ["none"]}):
        with pytest.raises(UserError, match=r"rows=auto.*another stage"):
            chosen.apply(configured, record | wrong)


def test_rows_that_have_to_stay_are_the_only_ones():
    fours = choose.rank(stage(), SLICE, 4)
    assert {micro_batch.rows(one.stage) for one in fours} == {4} and len(fours) > 1
    with pytest.raises(UserError, match="no micro-batch of 3 rows of small splits over v5e:2x2"):
        choose.choose(stage(), SLICE, tries=0, rows=3)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (["--config.data.rows=auto"], ["--auto_rows"]),
        (["--config.data.rows=16", "--config.data.rows=auto"], ["--auto_rows"]),
        (["-config.data.rows=auto", "--config.steps=3"], ["--config.steps=3", "--auto_rows"]),
        (["--config.data.rows=auto", "--config.data.rows=16"], ["--config.data.rows=16"]),
        (["--config.data.rows=16"], ["--config.data.rows=16"]),
        (["--other.data.rows=auto"], ["--other.data.rows=auto"]),
        (["--config.data.examples=auto"], ["--config.data.examples=auto"]),
    ],
)
def test_the_word_becomes_a_flag(given, left):
    assert auto_value.take(["xllm train", *given], {"config": stage()}) == ["xllm train", *left]


def test_a_command_that_chooses_nothing_says_what_does():
    done = forked.xllm("inspect", "--config=stage2_image:tiny", "--config.data.rows=auto")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("--config.data.rows: ") and "preflight --write=flags.txt" in line


def test_another_process_is_prepared_and_its_mistakes_are_told():
    with pytest.raises(UserError) as told:
        apart.search(stage(), SLICE, 16, search_=small_searches.tells)
    assert str(told.value) == "1: small on v5e:2x2, 16 rows, cache False, cpu. so it is"
    assert jax.config.jax_enable_compilation_cache  # of this process


@pytest.mark.parametrize(("seconds", "why"), [(300.0, "exit code 7"), (0.0, "after 0 s")])
def test_arithmetic_decides_where_another_process_gives_no_answer(seconds, why, capsys):
    found = apart.search(stage(), SLICE, seconds=seconds, search_=small_searches.dies)
    assert found["compiled"] == 0 and found["rows"] * found["accumulation"] == 16
    assert why in capsys.readouterr().err
    assert not multiprocessing.active_children()


@pytest.fixture
def auto(parsed_flags):
    """The flag is given."""
    flags.FLAGS[auto_value.FLAG].value = True


@pytest.fixture
def searches(tmp_path, monkeypatch):
    """What was searched for: (name of the slice, rows), on devices that `there` says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = []

    def search(stage, target, rows):
        asked.append((target.title, rows))
        return chosen.plain(choose.choose(stage, target, tries=0, rows=rows), stage, target)

    monkeypatch.setattr(apart, "search", search)
    return asked


def there(monkeypatch, name):
    monkeypatch.setattr(here, "target", lambda slices: targets.parse(name))


def test_a_run_keeps_its_choice_and_on_another_slice_its_rows(
    auto, searches, tmp_path, monkeypatch, capsys
):
    there(monkeypatch, "v5e-4")
    first = auto_rows.settle(stage(), str(tmp_path / "run"))
    assert first.data.rows * first.optimizer.accumulation == 16 and searches == [("v5e:2x2", 0)]
    assert "small on v5e:2x2" in capsys.readouterr().out
    assert auto_rows.settle(stage(), str(tmp_path / "run")) == first and len(searches) == 1
    assert auto_rows.settle(stage(), str(tmp_path / "other")) == first and len(searches) == 1
    there(monkeypatch, "v5e-1")
    moved = auto_rows.settle(stage(), str(tmp_path / "run"))
    assert searches[1:] == [("v5e:1x1", first.data.rows)]
    assert micro_batch.rows(moved) == micro_batch.rows(first) and moved.mesh != first.mesh
    assert auto_rows.settle(stage(), str(tmp_path / "run")) == moved and len(searches) == 2


def test_runs_go_on_as_they_were_begun(parsed_flags, searches, tmp_path, monkeypatch):
    there(monkeypatch, "v5e-1")
    (tmp_path / "given" / "checkpoints" / "20").mkdir(parents=True)
    assert auto_rows.settle(stage(), str(tmp_path / "given")) == stage() and not searches
    flags.FLAGS[auto_value.FLAG].value = True
    with pytest.raises(UserError, match=r"--config.data.rows=auto: .*rows of its own"):
        auto_rows.settle(stage(), str(tmp_path / "given"))
    first = auto_rows.settle(stage(), str(tmp_path / "run"))
    flags.FLAGS[auto_value.FLAG].value = False
    with pytest.raises(UserError, match=r"begun with 16 rows x 1.*go on with 8 x 2"):
        auto_rows.settle(stage(), str(tmp_path / "run"))
    assert auto_rows.settle(first, str(tmp_path / "run")) == first  # the same rows, as flags


def test_packed_kernels_have_to_be_there_first(auto, searches, tmp_path, monkeypatch):
    there(monkeypatch, "v5e-1")
    monkeypatch.chdir(tmp_path)
    configured = stage()

    def packed(configured, target, **options):
        one = choose.variant(configured, 16, {"data": 1, "fsdp": 1, "tensor": 1}, "none", ["llm"])
        made = choose._choice(configured, choose.Candidate(one, 1.0, True), 1.0, 0, 9)
        return chosen.plain(made, configured, target) | {"kept": False}

    monkeypatch.setattr(chosen, "find", packed)
    with pytest.raises(UserError, match=r"of the llm alone. First: xllm quantize --input=bases/ll"):
        auto_rows.settle(configured, str(tmp_path / "run"))
    (tmp_path / "bases" / "llm_int8").mkdir(parents=True)
    (tmp_path / "bases" / "llm_int8" / "about.json").write_text("{}")
    made = auto_rows.settle(configured, str(tmp_path / "run"))
    assert made.parts["llm"].weights == "int8" and made.init["llm"] == "bases/llm_int8"


def test_few_rows_a_device_are_told(capsys):
    auto_rows.advise(stage(), 4)
    assert (
        "8 rows x 2 are few rows for 4 devices; --config.data.rows=auto" in capsys.readouterr().err
    )
    whole = choose.variant(stage(), 16, {"data": 4, "fsdp": 1, "tensor": 1}, "none")
    for one, devices in ((stage(), 1), (whole, 4)):
        auto_rows.advise(one, devices)
    many = stage()
    many.data.rows = 32
    auto_rows.advise(many, 4)
    assert capsys.readouterr().err == ""


class Store:
    """The store of two hosts, in one process."""

    def __init__(self, index, values):
        self.index, self.count, self.values = index, 2, values

    def put(self, name, value):
        self.values[name] = json.dumps(value)

    def get(self, name, seconds=0.0):
        return json.loads(self.values[name])


def test_host_0_chooses_for_all(auto, searches, tmp_path, monkeypatch):
    there(monkeypatch, "v5e-4")
    values, made = {}, []
    for index in range(2):
        monkeypatch.setattr(hosts, "store", lambda index=index: Store(index, values))
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        made.append(auto_rows.settle(stage(), str(tmp_path / f"run{index}")))
    assert made[0] == made[1] and len(searches) == 1
    assert not (tmp_path / "run1").exists()
    there(monkeypatch, "v5e-256")  # 256 chips and 16 rows
    told = set()
    for index in range(2):
        monkeypatch.setattr(hosts, "store", lambda index=index: Store(index, values))
        with pytest.raises(UserError) as wrong:
            auto_rows.settle(stage(), str(tmp_path / f"none{index}"))
        told.add(str(wrong.value))
    assert len(told) == 1 and "splits over v5e:16x16" in told.pop()


def test_a_run_with_automatic_rows_trains_and_is_told_when_it_forgets(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(small_stage.ROOT / 'tests')!r})\n"
        "import test_auto_rows\n"
        "def get_config():\n    return test_auto_rows.stage(steps=1, unroll=1)\n"
    )
    workdir = tmp_path / "run"
    given = ("train", f"--config={file}", f"--workdir={workdir}")
    variables = virtual_devices.environment(2) | {"XDG_CACHE_HOME": str(tmp_path)}
    done = forked.xllm(*given, "--config.data.rows=auto", **variables)
    assert done.returncode == 0, done.stderr
    assert "small on 2 x cpu: 16 rows x 1, by memory" in done.stdout
    assert list(small_stage.curve(workdir)) == [1]  # one micro-batch is the update
    kept = json.loads((workdir / "chosen.json").read_text())
    assert (kept["rows"], kept["accumulation"], kept["samples_per_second"]) == (16, 1, 0.0)
    forgot = forked.xllm(*given, **variables)
    assert forgot.returncode == 2, forgot.stderr
    (line,) = forgot.stderr.splitlines()
    assert "begun with 16 rows x 1" in line and "--config.data.rows=auto" in line


def test_what_is_kept_of_a_choice_is_whole(tmp_path):
    one = choose.variant(stage(), 16, {"data": 1, "fsdp": 1, "tensor": 1}, "none")
    record = chosen.plain(choose.Choice(one, (), 1.0, 0, 3), stage(), targets.parse("v5e-1"))
    file = tmp_path / "chosen.json"
    file.write_text(json.dumps(record))
    assert chosen.read(file) == record
    for changed in ({"rows": "16"}, {"mesh": None}):
        file.write_text(json.dumps(record | changed))
        assert chosen.read(file) is None
