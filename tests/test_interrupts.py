"""Ctrl-C amid an import, or where Python drops exceptions, is heeded a moment later."""

from __future__ import annotations

import subprocess
import sys

import pytest
import small_stage

from xllm_jax.launch import cli

PRELUDE = """
import gc, os, signal, sys, time, weakref
signal.signal(signal.SIGINT, signal.default_int_handler)
from xllm_jax.launch import cli
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.01)
    print("went on", flush=True)
times = []
def collected(*_):
    times.append(1)
    len(times) > 1 or interrupt()
class Falling:
    def __del__(self):
        interrupt()
def main(_):
    {main}
    time.sleep(20)
    print("nobody heeded it", flush=True)
cli.run(main, safe)
"""
KEPT = "safe = 'All is whole'\n"
MOMENTS = {
    "an import": "import slow_module",
    "the collector": "gc.callbacks.append(collected); gc.collect()",
    "a finalizer": "Falling()",
    "a weak reference": "weakref.finalize(Falling, interrupt)()",
}


def run(tmp_path, main, safe=KEPT):
    (tmp_path / "slow_module.py").write_text(
        "import __main__\n__main__.interrupt()\nwhole = True\n"
    )
    script = PRELUDE.replace("cli.run", safe + "cli.run").format(main=main)
    command = [sys.executable, "-c", script]
    paths = f"{tmp_path}:{small_stage.ROOT}"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=40, env={"PYTHONPATH": paths}
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_neither_lost_nor_does_it_break_imports(tmp_path, moment):
    found = run(tmp_path, MOMENTS[moment])
    assert found == (cli.STOPPED, "went on\n", "Stopped. All is whole\n")


def test_ctrl_c_breaks_off_ordinary_code_at_once(tmp_path):
    assert run(tmp_path, "interrupt()") == (cli.STOPPED, "", "Stopped. All is whole\n")


def test_a_second_ctrl_c_while_the_command_ends_changes_nothing(tmp_path):
    safe = "def safe():\n    interrupt()\n    return 'All is whole'\n"
    found = run(tmp_path, "raise KeyboardInterrupt", safe)
    assert found == (cli.STOPPED, "went on\n", "Stopped. All is whole\n")


def test_jax_is_imported_whole_whenever_ctrl_c_comes(tmp_path):
    """Amid the modules of C++ it ended the process with SIGABRT, elsewhere with a traceback."""
    for delay in (0.03, 0.1, 0.3):
        code, _, said = run(tmp_path, f"signal.setitimer(signal.ITIMER_REAL, {delay}); import jax")
        assert (code, said) == (cli.STOPPED, "Stopped. All is whole\n")


STEPS = """
import pathlib
from xllm_jax.core import interrupts, watchdog
def dropped():
    try:
        interrupt()
    except KeyboardInterrupt:  # numpy does so while it reads the array of another library
        print("dropped", flush=True)
def main(_):
    interrupts.STEP_SECONDS = {patience}
    with watchdog.Watch(pathlib.Path('run'), 0, None) as watch:
        {main}
    print("nobody heeded it", flush=True)
"""
LONG = "; time.sleep(20)"
STEPPING = {
    "a step": ("watch.start(0); watch.reached(0); interrupt(); watch.reached(1)", "went on\n"),
    "a measurement": ("watch.start(0); interrupt(); watch.moved('measures')", "went on\n"),
    "a long step": ("watch.start(0); interrupt()" + LONG, "went on\n"),
    "a step, twice": ("watch.start(0); interrupt(); interrupt()" + LONG, "went on\n"),
    "the start": ("interrupt()" + LONG, ""),
    "the start, dropped": ("dropped(); watch.start(0); watch.reached(0)" + LONG, "dropped\n"),
    "after the last step": ("watch.start(0); interrupt()", "went on\n"),
}


@pytest.mark.parametrize("moment", STEPPING)
def test_a_run_loses_no_ctrl_c(tmp_path, moment):
    main, out = STEPPING[moment]
    steps = STEPS.format(main=main, patience=0.5 if moment == "a long step" else 30)
    script = PRELUDE.partition("def main")[0] + steps + KEPT + "cli.run(main, safe)\n"
    environment = {"PYTHONPATH": str(small_stage.ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment, cwd=tmp_path
    )
    told = "watch.start(0); " in main and "dropped" not in main
    line = "Ctrl-C: stops after the running step; again: at once\n" * told
    wanted = (cli.STOPPED, out, f"{line}Stopped. All is whole\n")
    assert (done.returncode, done.stdout, done.stderr) == wanted
