"""Starting: what was compiled is found again, one trace serves all who ask, little is imported."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import jax
import pytest
from small_stage import ROOT

from xllm_jax.configs import stage2_image
from xllm_jax.launch import compiled
from xllm_jax.objectives import answer
from xllm_jax.preflight import forecast, targets

sys.path.insert(0, str(ROOT / "benchmarks"))

import startup


def test_compiled_programs_are_kept_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment: dict[str, str] = {}
    before = jax.config.jax_compilation_cache_dir
    try:
        folder = compiled.keep(environment)
        assert folder is not None and folder.is_relative_to(tmp_path) and folder.is_dir()
        assert environment[compiled.VARIABLE] == str(folder)
        assert jax.config.jax_compilation_cache_dir == str(folder)  # though jax is here already
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("chosen", ["", "/somewhere/else"])
def test_a_folder_that_the_user_chose_stays(chosen):
    environment = {compiled.VARIABLE: chosen}
    assert compiled.keep(environment) is None and environment == {compiled.VARIABLE: chosen}


def test_a_home_that_cannot_be_written_keeps_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    environment: dict[str, str] = {}
    assert compiled.keep(environment) is None and environment == {}


def test_processors_of_two_kinds_have_two_folders(tmp_path):
    names = []
    for flags in ("fpu avx2", "fpu avx2 avx512f"):
        (tmp_path / "cpuinfo").write_text(f"model name : X\nflags : {flags}\n")
        names.append(compiled.processor(tmp_path / "cpuinfo"))
    assert names[0] != names[1] == compiled.processor(tmp_path / "cpuinfo")
    assert compiled.processor(tmp_path / "none")


def test_the_oldest_programs_leave_first(tmp_path):
    for number in range(4):
        file = tmp_path / f"{number}-cache"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 + number, 1000 + number))
    compiled.trim(tmp_path, most=250)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["2-cache", "3-cache"]


def test_commands_have_the_cache_on_and_find_their_programs(tmp_path):
    """A command compiles once; the next one reads what the first one wrote."""
    code = (
        "import sys; sys.argv = ['x']\n"
        "from xllm_jax.launch import cli\n"
        "def main(_):\n"
        "    import jax\n"
        "    hits = []\n"
        "    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))\n"
        "    jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8)))\n"
        "    print(sum(name.endswith('/cache_hits') for name in hits))\n"
        "cli.run(main)"
    )
    kept = {name: value for name, value in os.environ.items() if name != compiled.VARIABLE}
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, cwd=ROOT,
            env={**kept, "XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [run.returncode for run in said] == [0, 0], said[1].stderr
    assert int(said[0].stdout) == 0 < int(said[1].stdout), said[1].stderr
    assert list((tmp_path / "xllm_jax" / "compiled").rglob("*-cache"))


@pytest.mark.parametrize(("topology", "kept"), [("v5e-1", False), ("local", True)])
def test_what_is_compiled_for_absent_chips_is_not_kept(topology, kept, tmp_path):
    """jaxlib cannot read such a program again; what runs here is kept, by the same command."""
    code = (
        "import sys, importlib.util\n"
        "from absl import flags\n"
        "from xllm_jax.launch import cli, preflight\n"
        f"flags.FLAGS(['x', '--topology={topology}'], known_only=True)\n"
        "preflight.prepare_compiler()\n"
        "import jax\n"
        "from jax.sharding import SingleDeviceSharding\n"
        "from xllm_jax.preflight import targets\n"
        f"target = targets.parse('{topology}')\n"
        "there = target.kind == 'local' or importlib.util.find_spec('libtpu')\n"
        "device = targets.devices(target)[0] if there else jax.devices()[0]\n"
        "x = jax.ShapeDtypeStruct((8, 8), 'float32', sharding=SingleDeviceSharding(device))\n"
        "jax.jit(lambda x: (x @ x).sum()).lower(x).compile()\n"
        "print(device.platform)"
    )
    variables = {
        compiled.VARIABLE: str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",  # the TPU compiler does not know those of the tests
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, **variables},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert bool(list(tmp_path.glob("*-cache"))) == kept
    assert "compilation cache" not in done.stderr, done.stderr


def test_the_table_of_phases_has_every_stage_and_every_phase(monkeypatch, capsys):
    def run(command, **options):
        name, size = (word.partition("=")[2] for word in command[-2:])
        asked.append((name, size))
        shown = "[1.5, 0.25, 1.0, 0.125]" if size == "real" else "[1.5, 0.25, 1.0, 0.125, 2, 30]"
        return subprocess.CompletedProcess(command, 0, f"a line\n{shown}\n", "")

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(startup.subprocess, "run", run)
    for size in ("tiny", "real"):
        monkeypatch.setattr(sys, "argv", ["startup.py", f"--size={size}"])
        startup.main()
        head, _, *rows = capsys.readouterr().out.splitlines()
        stages = {file.stem for file in (ROOT / "configs").glob("stage*.py")}
        assert {name for name, asked_size in asked if asked_size == size} == stages
        assert len(rows) == len(stages) and "compiling" in head
        assert {row.count("|") for row in rows} == {head.count("|")}
        assert all(("30.00" in row) == (size == "tiny") for row in rows)


def test_phases_are_cpu_seconds_of_one_stage():
    """Of the real stage, of which nothing is compiled, in this process."""
    begun = time.process_time()
    found = startup.phases("stage_output_image", "real")
    assert len(found) == 4 and all(seconds >= 0 for seconds in found)
    assert 0 < sum(found[1:]) <= time.process_time() - begun


def test_counting_and_lowering_share_one_trace_of_the_step(monkeypatch):
    traced, whole = [], answer.loss

    def loss(*arguments, **options):
        traced.append(1)
        return whole(*arguments, **options)

    monkeypatch.setattr(answer, "loss", loss)
    stage = stage2_image.get_config("tiny")
    lowered = forecast.prepare(stage, targets.parse("local"))
    found = forecast.counts(lowered)
    assert found["flops"] >= found["minimum"] > 0
    # The step's; and the loss alone, whose products are those that it cannot do without.
    assert len(traced) == 2
    lowered.traced.lower()
    forecast.counts(lowered)
    assert len(traced) == 2


def test_training_imports_nothing_that_it_does_not_use():
    code = (
        "import sys\n"
        "import xllm_jax.launch.train\n"
        "assert 'jax' not in sys.modules\n"  # a mistake is told before
        "from xllm_jax.training import loop\n"
        "print(*sorted({'torch', 'tensorflow', 'transformers', 'pandas', 'matplotlib', 'fastapi',"
        " 'apache_beam', 'safetensors', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
