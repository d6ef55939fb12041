"""Starting: what was compiled is found again, one trace serves all who ask, little is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest
from small_stage import ROOT

from xllm_jax.configs import stage2_image
from xllm_jax.launch import compiled
from xllm_jax.objectives import answer
from xllm_jax.preflight import forecast, targets


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
