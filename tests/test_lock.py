"""Two commands never write into one folder; the lock of one that has ended is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from xllm_jax.core import atomic, hosts, lock
from xllm_jax.core.errors import UserError


@pytest.fixture
def file(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / lock.NAME


def test_a_second_one_is_refused_by_host_process_and_time(file):
    with lock.Lock(file, "run"):
        held = json.loads(file.read_text())
        assert held["process"] == os.getpid() and held["host"] and held["since"].endswith("UTC")
        with pytest.raises(UserError) as caught, lock.Lock(file, "run"):
            pass
        assert f"run: is in use by process {os.getpid()} on {held['host']}" in str(caught.value)
        assert held["since"] in str(caught.value)
    assert not file.exists()


HOLD = """
import pathlib, sys, time
from xllm_jax.core import lock
with lock.Lock(pathlib.Path(sys.argv[1]), 'run'):
    print('holds', flush=True)
    time.sleep(600)
"""


def test_the_lock_of_a_killed_process_is_taken_over_by_name(file, capfd):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(UserError, match=f"process {process.pid} on "), lock.Lock(file, "run"):
            pass
        process.kill()
        process.wait()
    with lock.Lock(file, "run"):
        assert json.loads(file.read_text())["process"] == os.getpid()
    assert f"run: taken over from process {process.pid} on " in capfd.readouterr().err


def test_a_process_number_that_is_given_again_is_another_process(file):
    with lock.Lock(file, "run"):
        held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"start": "1"}))  # it began at another time
    with lock.Lock(file, "run"):
        pass


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)


def elsewhere(file) -> None:
    """The lock of a process on another machine."""
    held = {"host": "other", "process": 1, "since": "then", "machine": "x", "token": "t"}
    atomic.write_json(file, held)


def test_a_lock_of_another_machine_is_watched_whatever_its_clock_says(file, soon, capfd):
    elsewhere(file)
    ended = threading.Event()

    def live():
        past = 1_000_000_000
        while not ended.wait(0.05):
            past -= 100
            os.utime(file, (past, past))  # its clock goes backwards

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 1 on other"), lock.Lock(file, "run"):
            pass
    finally:
        ended.set()
        thread.join()
    with lock.Lock(file, "run"):
        assert json.loads(file.read_text())["process"] == os.getpid()
    assert "taken over from process 1 on other since then" in capfd.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"process": "../../etc"}', "null", "[" * 100_000]
)
def test_a_lock_that_says_nothing_is_watched_too(file, soon, content):
    file.write_text(content)
    with lock.Lock(file, "run"):
        assert json.loads(file.read_text())["process"] == os.getpid()


def test_who_loses_its_lock_ends(file, soon, monkeypatch, capfd):
    left = threading.Event()
    monkeypatch.setattr(hosts, "leave", lambda code: left.set())
    with lock.Lock(file, "run"):
        elsewhere(file)
        assert left.wait(10)
    assert "taken over by process 1 on other" in capfd.readouterr().err
    assert json.loads(file.read_text())["host"] == "other", "the other one's lock stays"


@pytest.mark.parametrize("kind", ["link", "pipe", "zeros"])
def test_a_lock_that_is_no_file_is_not_read(kind, file, soon):
    """A pipe would be waited for, /dev/zero would be read without end, a link is another's file."""
    target = file.with_name("private.json")
    target.write_text('{"process": 1}')
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(target if kind == "link" else "/dev/zero")
    with lock.Lock(file, "run"):
        assert file.is_file() and not file.is_symlink()
    assert target.read_text() == '{"process": 1}'


@pytest.mark.parametrize(
    "name", ["a" * 300, "a/" * 3000, "\0", "a\0b", "two\nlines", "  ", "\x1b[2J"]
)
def test_a_folder_of_no_name_is_refused_in_one_line(name, tmp_path):
    with pytest.raises(UserError) as refused, lock.Lock(tmp_path / name / lock.NAME, "run"):
        pass
    assert str(refused.value).isprintable()
    assert not list(tmp_path.iterdir())
