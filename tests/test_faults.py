"""What can go wrong in a run: each fault ends it in time, and the same command continues it."""

from __future__ import annotations

import functools
import os
import random
import re
import sys
import time
import types
from pathlib import Path

import forked
import host_runs
import jax.numpy as jnp
import numpy as np
import pytest
import small_stage

from xllm_jax.core import atomic, base_description, checkpoint
from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli
from xllm_jax.training import loop, startup

# Calls a function of the host INDEX at a micro-batch; its own threads go on meanwhile.
AT = """
def at(number, index, call):
    score = loop.Loop.score
    seen = []
    def scored(self, metrics):
        score(self, metrics)
        seen.append(1)
        if len(seen) == number and INDEX == index:
            call(self)
    loop.Loop.score = scored
def terminate(run):
    os.kill(os.getpid(), signal.SIGTERM)
    while not run.watch.stopping:
        watchdog.time.sleep(0.01)
    save = run.checkpoints.save
    def saved(*arguments):
        save(*arguments)  # goes on in the background
        os.kill(os.getpid(), signal.SIGTERM)
    run.checkpoints.save = saved
def kill(run):
    os.kill(os.getpid(), signal.SIGKILL)
"""
FIT = """
def main():
    loop.fit(host_runs.stage(stall={stall}), {workdir!r})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The curve of a run without faults."""
    workdir = tmp_path_factory.mktemp("whole")
    code = FIT.format(workdir=str(workdir / "run"), stall=60)
    assert host_runs.codes(host_runs.start(1, code, workdir)) == [0], host_runs.said(workdir, 1)
    return small_stage.curve(workdir / "run")


def fit(count: int, workdir: Path, code: str = "", stall: int = 60) -> list[int]:
    """Trains with faults put in by `code`; exit codes of the hosts."""
    code = AT + code + FIT.format(workdir=str(workdir / "run"), stall=stall)
    return host_runs.codes(host_runs.start(count, code, workdir))


def check_continues(workdir: Path, whole: dict[int, float]) -> None:
    """The same command ends well, and the curve is that of a run without faults."""
    assert fit(1, workdir) == [0], host_runs.said(workdir, 1)
    found = small_stage.curve(workdir / "run")
    assert found.keys() == whole.keys()
    np.testing.assert_allclose(list(found.values()), list(whole.values()), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2])
def test_sigterm_to_one_host_saves_on_all(whole, tmp_path, count):
    codes = fit(count, tmp_path, f"at(3, {count - 1}, terminate)\n")
    said = host_runs.said(tmp_path, count)
    assert codes == [cli.SAVED] * count, said
    assert "SIGTERM again" in said
    saved = [int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert max(saved) in (3, 4)  # the other host may have begun one more
    assert not (tmp_path / "run" / "final").exists()
    check_continues(tmp_path, whole)


def test_a_killed_host_ends_the_others(whole, tmp_path):
    codes = fit(2, tmp_path, "at(5, 1, kill)\n", stall=15)
    assert codes == [cli.LOST, -9], host_runs.said(tmp_path, 2)
    assert "host 1 gave no sign of life" in host_runs.said(tmp_path, 2)
    check_continues(tmp_path, whole)


def test_the_loss_of_host_0_ends_the_others(tmp_path):
    codes = fit(2, tmp_path, "at(3, 0, kill)\n")
    assert codes == [-9, cli.LOST], host_runs.said(tmp_path, 2)
    assert "ost 0 was lost" in (tmp_path / "host-1.txt").read_text()


# Kills a host that has written its arrays of the second checkpoint, before all hosts have.
AT_THE_BARRIER = """
def before_the_barrier(event, *_, **__):
    if event == '/jax/checkpoint/write/async/commit_duration_sec':
        commits.append(event)
        if len(commits) == 2 and INDEX == {index}:
            print('DIES', watchdog.time.time(), sorted(os.listdir({checkpoints!r})))
            os.kill(os.getpid(), signal.SIGKILL)
commits = []
jax.monitoring.register_event_duration_secs_listener(before_the_barrier)
"""


@pytest.mark.parametrize("index", [0, 1])
def test_a_host_that_dies_between_save_and_barrier_costs_no_checkpoint(index, whole, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    code = AT_THE_BARRIER.format(index=index, checkpoints=str(checkpoints))
    codes, ended = fit(2, tmp_path, code, stall=15), time.time()
    said = host_runs.said(tmp_path, 2)
    assert codes == [-9, cli.LOST] if index == 0 else [cli.LOST, -9], said
    died = re.search(r"DIES (\S+) \['2', '4\..*orbax-checkpoint-tmp", said)
    assert died, "amid the second save"
    assert ended - float(died[1]) < 60, "15 s until a host counts as lost, and some to tell"
    kept = [name for name in os.listdir(checkpoints) if name.isdecimal()]
    assert kept == ["2"], "half of 4 does not count"
    saved = checkpoint.Checkpoints(tmp_path / "run")
    assert saved.damage(2) == ""
    saved.close()
    check_continues(tmp_path, whole)
    assert "Resumes at micro-batch 2" in host_runs.said(tmp_path, 1)
    assert not list(checkpoints.glob("*tmp*"))


def test_a_source_that_hangs_is_told_with_its_host_and_record(tmp_path):
    hang = (
        "import threading\n"
        "from xllm_jax.data import mixture\n"
        "read = mixture.read\n"
        "class Hanging:\n"
        "    def __init__(self, examples): self.examples, self.reads = examples, 0\n"
        "    def __len__(self): return len(self.examples)\n"
        "    def __getitem__(self, index):\n"
        "        self.reads += 1\n"
        "        if self.reads > 40: threading.Event().wait()\n"
        "        return self.examples[index]\n"
        "def hanging(*a, **o): return Hanging(read(*a, **o)) if INDEX else read(*a, **o)\n"
        "mixture.read = hanging\n"
    )
    codes = fit(2, tmp_path, hang, stall=15)
    assert codes == [cli.LOST] * 2, host_runs.said(tmp_path, 2)
    slow, other = ((tmp_path / "run" / f"stall-{index}.txt").read_text() for index in (1, 0))
    for text in (slow, other, *(host_runs.said(tmp_path, 1), host_runs.said(tmp_path, 2))):
        assert "host 1 waits for input" in text, text
    assert "this is host 1 of 2, which waits for input" in slow
    assert "being read: text[" in slow and "__getitem__" in slow
    assert "being read: text[" not in other and "samples of the batch that runs: " in other


WATCH = """
def main():
    with watchdog.Watch(loop.Path({folder!r}), {stall}, None) as watch:
        watch.stepped()
        watchdog.threading.Event().wait()
"""


def test_one_host_that_stalls_ends(tmp_path):
    code = WATCH.format(folder=str(tmp_path), stall=0.5)
    assert host_runs.codes(host_runs.start(1, code, tmp_path)) == [cli.LOST]
    assert "wait" in (tmp_path / "stall-0.txt").read_text()


EARLY = """
def main():
    with watchdog.Watch(loop.Path({folder!r}), 60, hosts.store()) as watch:
        if INDEX == 0:
            watch.start(3)
            watch.reached(3)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        watchdog.threading.Event().wait()
"""


def test_sigterm_to_a_host_that_still_loads_ends_all(tmp_path):
    """The other one waits in its first step, which cannot end."""
    code = EARLY.format(folder=str(tmp_path))
    codes = host_runs.codes(host_runs.start(2, code, tmp_path))
    assert codes == [cli.SAVED] * 2, host_runs.said(tmp_path, 2)
    assert "nothing to save" in host_runs.said(tmp_path, 2)


# Kills the process at the n-th time it touches a file whose path holds some words.
KILL_AT = """
import itertools, os, signal, sys
def kill_at(number, words):
    times = itertools.count(1)
    def hook(event, arguments):
        if event.startswith(('open', 'os.', 'shutil.')):
            if words in ' '.join(map(str, arguments)) and next(times) == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
"""


def test_kills_amid_saves_lose_nothing(whole, tmp_path):
    """Every start of the command dies at a random moment of a save, until one lives."""
    for words in ("checkpoints/2", "checkpoints/4", "checkpoints/6", "final"):
        number = random.randint(1, 12)
        codes = fit(1, tmp_path, f"{KILL_AT}kill_at({number}, {words!r})\n")
        assert codes in ([-9], [0]), (words, number, host_runs.said(tmp_path, 1))
    check_continues(tmp_path, whole)
    assert base_description.base_about(tmp_path / "run" / "final")["stage"]["name"] == "small"


SAVE_TWICE = (
    KILL_AT
    + """
sys.path[:0] = ['tests', '.']
import test_faults
kill_at({number}, {words!r})
test_faults.save_{what}(test_faults.Path({folder!r}), {step})
"""
)


def save_base(folder: Path, number: int) -> None:
    """Replaces a base by one whose values are all `number`."""
    params = {"llm": {"a": np.full(9, number, np.float32)}}
    checkpoint.save_base(folder / "base", params, {"number": number})


def save_run(folder: Path, number: int) -> None:
    """Saves a checkpoint, of which one is kept."""
    saved = checkpoint.Checkpoints(folder, keep=1)
    saved.save(number, {"a": np.full(9, number, np.float32)}, {"data": number})
    saved.close()


@pytest.mark.parametrize("what", ["base", "run"])
def test_a_save_that_is_killed_leaves_a_whole_one(what, tmp_path):
    """The second save dies at random file operations, or lives."""
    save = {"base": save_base, "run": save_run}[what]
    words = {"base": "base", "run": "checkpoints"}[what]
    save(tmp_path, 1)
    ends = []
    for step, number in enumerate(random.sample(range(1, 40), 3), start=2):
        named = {"step": step, "number": number, "words": words, "what": what}
        code = SAVE_TWICE.format(folder=str(tmp_path), **named)
        ends.append(forked.run([sys.executable, "-c", code], cwd=host_runs.ROOT).returncode)
        if what == "base":
            about = base_description.base_about(tmp_path / "base")["number"]
            stored = checkpoint.open_leaves(tmp_path / "base")["llm/a"].read().result()
            assert set(stored) == {float(about)}, number
        else:
            saved = checkpoint.Checkpoints(tmp_path, keep=1)
            found = startup.newest(saved)
            assert found is not None and saved.about(found)["data"] == found, number
            saved.close()
    assert set(ends) <= {-9, 0}
    assert not (tmp_path / "damaged").exists()


def saved_twice(folder: Path) -> checkpoint.Checkpoints:
    """Checkpoints 1 and 2 of a small state."""
    checkpoints = checkpoint.Checkpoints(folder)
    for step in (1, 2):
        state = {"a": jnp.full((64, 64), step, jnp.float32), "b": jnp.arange(7) + step}
        checkpoints.save(step, state, {"data": {}, "stage": {}, "base": {}})
    checkpoints.wait()
    return checkpoints


def largest(folder: Path) -> Path:
    """The file of a checkpoint that holds its arrays."""
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("spoil", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("which", ["arrays", "about"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(spoil, which, tmp_path, capsys):
    checkpoints = saved_twice(tmp_path)
    folder = checkpoints.directory / "2"
    spoil(largest(folder / "state") if which == "arrays" else folder / "about" / "metadata")
    assert startup.newest(checkpoints) == 1
    told = capsys.readouterr().err
    assert "Checkpoint 2 is damaged and not used" in told
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    like = {"a": jnp.zeros((64, 64)), "b": jnp.zeros(7, jnp.int32)}
    assert checkpoints.steps() == [1]
    restored = checkpoints.restore(1, like)
    np.testing.assert_array_equal(restored["a"], np.ones((64, 64)))
    checkpoints.close()


def test_without_any_whole_checkpoint_the_run_does_not_start_anew(tmp_path):
    checkpoints = saved_twice(tmp_path)
    for step in (1, 2):
        truncate(largest(checkpoints.directory / str(step) / "state"))
    with pytest.raises(UserError, match="no checkpoint is whole"):
        startup.newest(checkpoints)
    checkpoints.close()


@pytest.mark.parametrize("there", ["file", "link"])
def test_a_damaged_checkpoint_without_a_place_is_one_line(there, tmp_path):
    checkpoints = saved_twice(tmp_path / "run")
    truncate(largest(checkpoints.directory / "2" / "state"))
    aside, other = tmp_path / "run" / "damaged", tmp_path / "other"
    other.mkdir()
    aside.write_text("") if there == "file" else aside.symlink_to(other)
    with pytest.raises(UserError, match=str(aside)):
        startup.newest(checkpoints)
    assert checkpoints.steps() == [1, 2] and not list(other.iterdir())
    checkpoints.close()


@pytest.mark.parametrize(("lowest", "kept"), [(True, {2, 4}), (False, {1, 4})])
def test_the_best_checkpoint_has_a_direction(lowest, kept, tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, metric="cer", lowest=lowest)
    for step, cer in enumerate((0.9, 0.1, 0.5, 0.6), start=1):
        checkpoints.save(step, {"a": jnp.ones(3)}, {}, {"cer": cer})
    assert set(checkpoints.steps()) == kept
    checkpoints.close()
    # Another start knows the best one too; a checkpoint without the metric does not replace it.
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, metric="cer", lowest=lowest)
    for step, found in ((5, {"cer": 0.7}), (6, None), (7, {"cer": float("nan")})):
        checkpoints.save(step, {"a": jnp.ones(3)}, {}, found)
    assert set(checkpoints.steps()) == {min(kept), 7}
    checkpoints.close()


def test_an_unknown_metric_is_refused():
    run = types.SimpleNamespace(stage=small_stage.stage())
    run.stage.best.metric = "cer"
    with pytest.raises(UserError, match=r"best.metric: no metric 'cer'.*loss"):
        loop.Loop.score(run, {"loss": jnp.ones(())})


def test_readers_find_the_old_folder_while_the_new_one_takes_its_name(tmp_path):
    save = functools.partial(checkpoint.save_base, tmp_path / "base")
    save({"llm": {"a": np.zeros(2, np.float32)}}, {"number": 1})
    (tmp_path / "base").rename(tmp_path / f"base{atomic.REPLACED}")
    assert checkpoint.base_exists(tmp_path / "base")
    assert base_description.base_about(tmp_path / "base")["number"] == 1
    save({"llm": {"a": np.ones(2, np.float32)}}, {"number": 2})
    assert base_description.base_about(tmp_path / "base")["number"] == 2
    assert [folder.name for folder in tmp_path.iterdir()] == ["base"]
