"""Hosts that JAX has joined write one cache: each shard once, also when one of them is killed."""

from __future__ import annotations

import types

import host_runs
import pytest
import small_cache

from xllm_jax.core.errors import UserError
from xllm_jax.feature_cache import cache_plan, write
from xllm_jax.launch import cli
from xllm_jax.launch import hosts as host_flags

SHARD = 2  # media
WRITE = """
import pathlib
import small_cache
from xllm_jax.feature_cache import cache_plan, write
from xllm_jax.data.record import Record

def die_at(number):
    medium, seen = cache_plan.FeatureCachePlan.medium, []
    def counted(*arguments):
        seen.append(1)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return medium(*arguments)
    cache_plan.FeatureCachePlan.medium = counted

def main():
    output, store = pathlib.Path({output!r}), hosts.store()
    write.computation, write.computing = small_cache.arithmetic, lambda made, device_mesh: {{}}
    if INDEX == 0 and {dies!r}:
        die_at({dies!r})
    with watchdog.Watch(output, 0, store):
        stage = small_cache.pictures(pathlib.Path({pictures!r}))
        made = cache_plan.make(stage, output, 'configs/small.py', {shard})
        found = write.run(made, 2, INDEX, COUNT, False, store)
        print('MEDIA', found['modalities']['image']['media'])
"""


def start(folder, name: str, dies: int = 0) -> tuple[list[int], str]:
    """Two hosts write the cache: (their exit codes, what they said)."""
    named = {"pictures": str(folder / "pictures"), "output": str(folder / "shared")}
    code = WRITE.format(**named, dies=dies, shard=SHARD)
    codes = host_runs.codes(host_runs.start(2, code, folder / name))
    return codes, host_runs.said(folder / name, 2)


def test_a_writer_is_killed_and_the_same_command_finishes(tmp_path, monkeypatch):
    """Host 0, and with it the store, at its third shard; then all ends as if one had written."""
    monkeypatch.setattr(write, "computation", small_cache.arithmetic)
    monkeypatch.setattr(write, "computing", lambda made, device_mesh: {})
    stage = small_cache.pictures(small_cache.draw(tmp_path / "pictures", 14))
    write.run(cache_plan.make(stage, tmp_path / "whole", "configs/small.py", SHARD), 4)
    # One medium is looked at before, and two batches are read ahead.
    codes, said = start(tmp_path, "killed", dies=1 + 2 * SHARD + 4)
    assert codes == [-9, cli.LOST], said
    shared = tmp_path / "shared"
    # A shard may have been half written when its host died; the next run removes that file.
    whole = [f for f in (shared / "shards").iterdir() if f.suffix != ".partial"]
    before = {f: f.stat().st_mtime_ns for f in whole}
    assert len(before) >= 2 and not (shared / "cache.json").exists()
    codes, said = start(tmp_path, "again")
    assert codes == [0, 0] and said.count("MEDIA 14") == 2, said
    assert small_cache.contents(shared) == small_cache.contents(tmp_path / "whole")
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert not list(shared.rglob("*.partial"))


def share(monkeypatch, count, index):
    """The flags' share where the hosts are not joined."""
    for name, value in (("HOSTS", ""), ("COUNT", count), ("INDEX", index)):
        monkeypatch.setattr(host_flags, name, types.SimpleNamespace(value=value))
    return host_flags.share()


def test_hosts_that_share_a_folder_alone_are_numbered_by_flags(monkeypatch):
    assert share(monkeypatch, None, None) == (0, 1)
    assert share(monkeypatch, 4, 2) == (2, 4)
    for count, index, word in ((4, None, "--host_index: is missing"), (4, 4, "0 to 3")):
        with pytest.raises(UserError, match=word):
            share(monkeypatch, count, index)
