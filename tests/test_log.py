"""The run's log: one uninterrupted curve, and event files that TensorBoard reads."""

from __future__ import annotations

import json
import sys
import types

from tensorboard.compat.proto import event_pb2

from xllm_jax.core.log import Log


def records(path) -> list[event_pb2.Event]:
    """Events of a file, by the format: length, checksum, payload, checksum."""
    data, found = path.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_scalars_reach_both_files(tmp_path):
    log = Log(tmp_path, "run", total=2, start=0)
    log.write(1, {"loss": 0.5})
    log.write(2, {"loss": 0.25})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    (file,) = (tmp_path / "tensorboard").iterdir()
    values = [(e.step, v.tag, v.simple_value) for e in records(file) for v in e.summary.value]
    assert values == [(1, "loss", 0.5), (2, "loss", 0.25)]


def test_resuming_drops_later_lines_and_a_cut_one(tmp_path):
    kept = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}]
    text = "".join(json.dumps(line) + "\n" for line in kept) + '{"step": 4, "lo'
    (tmp_path / "metrics.jsonl").write_text(text)
    log = Log(tmp_path, "run", total=3, start=2)
    log.write(3, {"loss": 1.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [*kept[:2], {"step": 3, "loss": 1.5}]


def test_other_hosts_write_nothing(tmp_path):
    log = Log(tmp_path / "none", "run", total=1, start=0, main=False)
    log.write(1, {"loss": 1.0})
    log.close()
    assert not (tmp_path / "none").exists()


def test_nothing_secret_goes_to_weights_and_biases(tmp_path, monkeypatch):
    """It is asked to keep output and repository back; no file of the run has the key either."""
    secret = "secret-5f3a9c"
    for name in ("WANDB_API_KEY", "OPENAI_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, secret)
    sent = []

    class Run:
        def log(self, scalars, step):
            sent.append((scalars, step))

        def finish(self):
            pass

    def init(**options):
        sent.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = Log(tmp_path, "run", 2, 0, wandb="project")
    log.write(1, {"loss": 1.0})
    log.log("a word")
    log.close()
    assert sent[0]["settings"] == {"console": "off", "disable_git": True, "save_code": False}
    assert sent[0].keys() == {"settings", "project", "name", "id", "resume", "dir"}
    assert sent[1:] == [({"loss": 1.0}, 1)] and secret not in repr(sent)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files and not any(secret.encode() in file.read_bytes() for file in files)
