"""A disk that is full, read-only or no folder: one line, an exit code, and nothing half written."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import small_runs
import small_stage
from restricted import restricted

from xllm_jax.core import atomic, disk
from xllm_jax.core.errors import CannotWrite, UserError
from xllm_jax.launch import cli, terminal

STAGE = """
import sys
sys.path.insert(0, {tests!r})
import host_runs
def get_config():
    return host_runs.stage(steps={steps}, save_every=2)
"""
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(small_stage.ROOT)}


def train(folder: Path, workdir: Path | str, steps: int, limit: int = 0, **options):
    """Starts `xllm train` of a small stage; no file may get larger than `limit` bytes."""
    config = folder / f"stage{steps}.py"
    config.write_text(STAGE.format(tests=str(Path(__file__).parent), steps=steps))
    command = (sys.executable, "-m", "xllm_jax.launch.commands", "train", f"--config={config}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    return forked.Popen(
        [*(restricted(limit) if limit else restricted()), *command, f"--workdir={workdir}"],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        **pipes,
    )


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, last line, everything) of a process."""
    said = process.communicate(timeout=300)[0]
    return process.returncode, said.strip().splitlines()[-1], said


def folders(workdir: Path) -> list[str]:
    return sorted(folder.name for folder in workdir.glob("checkpoints/*"))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path):
    """No file of the next save may get as large as it has to."""
    workdir = tmp_path / "run"
    code, _, said = ended(train(tmp_path, workdir, steps=4))
    assert code == 0, said
    largest = max(f.stat().st_size for f in (workdir / "checkpoints" / "4").rglob("*"))
    for file in workdir.glob("tensorboard/*"):
        assert file.stat().st_size < largest / 2
    code, line, said = ended(train(tmp_path, workdir, steps=8, limit=largest // 2))
    assert code == cli.UNWRITABLE == 74, said
    assert f"{workdir}/checkpoints/6: cannot be written (File too large)" in line, said
    assert "Checkpoint 4 is whole" in line
    assert "Traceback" not in said and "Error" not in said and "rror:" not in said
    assert folders(workdir) == ["2", "4"], "nothing of the failed save is left"
    code, _, said = ended(train(tmp_path, workdir, steps=8))
    assert code == 0 and "Resumes at micro-batch 4" in said
    assert list(small_stage.curve(workdir)) == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("workdir", "code", "why"),
    [
        ("/dev/null/x", cli.FAILED, "/dev/null/x: cannot be written (Not a directory)"),
        ("stage2.py", cli.FAILED, "stage2.py: cannot be written (File exists)"),
        ("", cli.FAILED, "--workdir: names no folder"),
        ("/sys/kernel/x", cli.UNWRITABLE, "/sys/kernel/x: cannot be written ("),
        ("/proc/1/x/y", cli.FAILED, "cannot be written ("),
    ],
)
def test_an_unusable_workdir_is_one_line(tmp_path, workdir, code, why):
    found, line, said = ended(train(tmp_path, workdir, steps=2))
    assert (found, said.count("\n")) == (code, 1), said
    assert why in line


def test_ctrl_c_amid_saves_leaves_whole_checkpoints(tmp_path):
    """At three moments of a run that saves almost always."""
    workdir = tmp_path / "run"
    for moment in (0.0, 0.05, 0.1):
        before = folders(workdir) if workdir.exists() else []
        with train(tmp_path, workdir, steps=4000) as process:
            while set(folders(workdir)) <= set(before):
                time.sleep(0.01)
            time.sleep(moment)
            process.send_signal(signal.SIGINT)
            code, line, said = ended(process)
        assert code == cli.STOPPED, said
        assert "Traceback" not in said and "cannot schedule" not in said
        kept = folders(workdir)
        assert all(name.isdecimal() for name in kept), kept
        assert f"Stopped. Checkpoint {max(map(int, kept))} is whole" in line
        assert not (workdir / "in-use.json").exists()


LINGERS = """
import atexit, threading, time
from xllm_jax.launch import cli
def main(_):
    threading.Thread(target=time.sleep, args=(600,)).start()
    atexit.register(lambda: print("tidied", flush=True))
    raise KeyboardInterrupt
cli.run(main, "All is whole")
"""


def test_ctrl_c_waits_for_no_thread():
    """One that is amid something when Python ends may also abort the process."""
    command = (sys.executable, "-c", LINGERS)
    done = forked.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == cli.STOPPED, done.stderr
    assert (done.stdout, done.stderr) == ("tidied\n", "Stopped. All is whole\n")


@pytest.mark.parametrize(
    ("output", "why"),
    [("", "--output: names no folder"), ("file", "file: cannot be written (File exists)")],
)
def test_a_demo_without_a_usable_folder_is_one_line(tmp_path, output, why):
    (tmp_path / "file").write_text("kept")
    command = (sys.executable, "-m", "xllm_jax.launch.commands", "demo", f"--output={output}")
    done = forked.run(
        command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.count("\n")) == (cli.FAILED, 1), done.stderr
    assert why in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_a_closed_pipe_ends_training(tmp_path):
    """Who reads stderr, with the progress bar, goes away in the middle."""
    workdir = tmp_path / "run"
    with (tmp_path / "out.txt").open("w") as out:
        process = train(tmp_path, workdir, 4000, stdout=out, stderr=subprocess.PIPE)
        while not list(workdir.glob("checkpoints/[0-9]")):
            time.sleep(0.01)
        process.stderr.close()
        assert process.wait(300) == terminal.UNHEARD
    assert all(name.isdecimal() for name in folders(workdir))
    assert not (workdir / "in-use.json").exists()


COMMANDS = {
    "world": ("--images=4", "--output=out"),
    "build-backbones": ("--output=out",),
    "convert": ("--source=world", f"--input={small_runs.TOKENIZER}", "--output=out"),
    "demo": ("--quick", "--output=out"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_that_writes_says_so_in_one_line(name, tmp_path):
    """No file may get larger than 1 kB; tests of other commands' writers are beside them."""
    command = (sys.executable, "-m", "xllm_jax.launch.commands", name, *COMMANDS[name])
    # A fork that ends draws the bar of the demo once more.
    run = subprocess.run if name == "demo" else forked.run
    done = run(
        [*restricted(1000), *command],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == cli.UNWRITABLE, done.stderr
    *progress, line = done.stderr.replace("\r", "\n").splitlines()
    assert "cannot be written (File too large)" in line
    assert all("it/s" in one or "/s" in one or not one.strip() for one in progress), done.stderr
    if name != "demo":  # which ends its other steps by SIGTERM
        assert not [file for file in tmp_path.rglob("*") if ".partial" in file.name]
        assert not list(tmp_path.rglob("*in-use*"))


def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        code = "from xllm_jax.launch import cli; cli.run(lambda _: print('an answer'))"
        command = (sys.executable, "-c", code)
        done = forked.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (cli.UNWRITABLE, 1), done.stderr
    assert "cannot be written (No space left on device)" in done.stderr


def errors() -> list[Exception]:
    """As the system, tensorstore and a group of threads tell of a full disk."""
    inner = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    chained = RuntimeError("the save failed")
    chained.__cause__ = inner
    words = 'RESOURCE_EXHAUSTED: Failed writing: "x" [OS error 28: ENOSPC No space left on device]'
    return [inner, chained, ValueError(words), ExceptionGroup("threads", [KeyError("a"), inner])]


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_every_form_of_a_full_disk_is_told_by_name(error, tmp_path):
    named = r"shard: cannot be written \(No space left on device\)"
    with pytest.raises(CannotWrite, match=named), disk.writing(tmp_path / "shard"):
        raise error
    kept = "Shards 1 and 2 are whole"
    with pytest.raises(CannotWrite, match=kept), disk.told(lambda: kept):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        UserError("cannot be read", field="a.jpg"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
        PermissionError(errno.EACCES, "Permission denied", "/data/a.jpg"),
        KeyError("No such key"),
    ],
)
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, disk.told(str), disk.writing(tmp_path / "shard"):
        raise error
    assert caught.value is error


def test_a_file_that_fails_leaves_nothing_and_the_old_one(tmp_path):
    atomic.write_json(tmp_path / "a.json", [1])
    for error in (OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):
        with contextlib.suppress(BaseException), atomic.whole(tmp_path / "a.json") as partial:
            partial.write_text("half")
            raise error
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "[\n 1\n]\n"
