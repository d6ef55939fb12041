"""Where links and pipes of a folder that a stranger has filled lead, nothing is written or read."""

from __future__ import annotations

import os

import numpy as np
import pytest

from xllm_jax.convert import conversion_record, run_export
from xllm_jax.core import atomic, new_folder, watchdog
from xllm_jax.core.errors import UserError
from xllm_jax.core.log import Events, Log
from xllm_jax.data.quarantine import Quarantine
from xllm_jax.data.record import Skipped

PRIVATE = '{"step": 0, "drawn": 0, "file": "private", "count": 7}\n'


def log(folder):
    run = Log(folder, "run", total=1, start=0)
    run.write(1, {"loss": 1.0})
    run.close()


def quarantine(folder):
    Quarantine(folder / "quarantine.jsonl", 1.0).add(1, [Skipped("a", "b", True, "c")], drawn=1)


def stall(folder):
    with watchdog.Watch(folder, 0, None) as watch:
        watch._dump("why")


def shard(folder):
    tensors = {"a": np.zeros(3, "float32")}
    run_export.write_shards(tensors, folder)


def conversion(folder):
    conversion_record.Conversion("world", {}, [], [], {}, [], {}, {}, "0").write(folder)


WRITERS = {
    "metrics.jsonl": log,
    "quarantine.jsonl": quarantine,
    "stall-0.txt": stall,
    "model.safetensors": shard,
    "conversion.json": conversion,
}


def is_written(write, folder):
    try:
        write(folder)
    except UserError as error:
        assert "is a link, or no regular file" in error.what
        return False
    return True


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link(name, there, tmp_path):
    folder, target = tmp_path / "run", tmp_path / "private"
    folder.mkdir()
    if there:
        target.write_text(PRIVATE)
    (folder / name).symlink_to(target)
    made = is_written(WRITERS[name], folder)
    assert target.exists() == there
    assert not there or target.read_text() == PRIVATE
    assert made == (not (folder / name).is_symlink())
    assert not made or (folder / name).stat().st_size


@pytest.mark.parametrize("name", WRITERS)
def test_nobody_waits_for_a_pipe(name, tmp_path):
    os.mkfifo(tmp_path / name)
    if is_written(WRITERS[name], tmp_path):
        assert (tmp_path / name).is_file()


def test_an_event_file_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr("time.time_ns", lambda: 5)
    target = tmp_path / "private"
    name = f"events.out.tfevents.5.{os.uname().nodename}"
    (tmp_path / name).symlink_to(target)
    with pytest.raises(UserError):
        Events(tmp_path, 0)
    assert not target.exists()


def test_a_new_folder_is_no_link_to_another(tmp_path):
    other, output = tmp_path / "other", tmp_path / "base"
    other.mkdir()
    new_folder.partial_folder(output).symlink_to(other)
    with new_folder.new_folder(output) as partial:
        atomic.write_text(partial / "about.json", "{}")
    assert [file.name for file in output.iterdir()] == ["about.json"]
    assert not output.is_symlink()
    assert not list(other.iterdir())
