"""Hosts that JAX has joined answer each sample once, and give the numbers of one process."""

from __future__ import annotations

import host_runs
import pytest
import suite_data

from xllm_jax.evaluation.suites import run
from xllm_jax.evaluation.suites.run import Place

FILES = ("results.json", "results.md", "results.html", "answers/test_ios.jsonl")
UTTERANCES = 11  # three shards, the last one short
CODE = """
import pathlib
import suite_data
from xllm_jax.evaluation.suites import run

def main():
    root, store, asked = pathlib.Path({root!r}), hosts.store(), []
    config = suite_data.speech_config(root)
    place = run.Place(root / {out!r}, "", INDEX, COUNT, store)
    with watchdog.Watch(place.folder, 0, store):
        shown = run.run("asr", config, suite_data.model(suite_data.misheard, asked=asked), place)
    print("ASKED", len(asked), "TABLES", "Character error rate" in shown)
"""


@pytest.mark.parametrize("count", [2, 3])
def test_joined_hosts_share_the_work(count, tmp_path):
    config = suite_data.speech(tmp_path, UTTERANCES)
    model = suite_data.model(suite_data.misheard)
    run.run("asr", config, model, Place(tmp_path / "one"))
    code = CODE.format(root=str(tmp_path), out="many")
    codes = host_runs.codes(host_runs.start(count, code, tmp_path / "said"))
    said = host_runs.said(tmp_path / "said", count)
    assert codes == [0] * count, said
    lines = [line.split() for line in said.splitlines() if line.startswith("ASKED")]
    assert sum(int(line[1]) for line in lines) == UTTERANCES and len(lines) == count
    assert all(line[3] == "True" and int(line[1]) > 0 for line in lines)
    for name in FILES:
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
