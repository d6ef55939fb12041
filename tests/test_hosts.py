"""Several hosts train what one would, and refuse to start when they are not the same."""

from __future__ import annotations

import json
import random
import re
import shutil

import host_runs
import jax
import numpy as np
import pytest
import small_stage
import test_divergence

from xllm_jax.core import base_description, checkpoint, errors, fingerprint, hosts, watchdog
from xllm_jax.launch import hosts as flags
from xllm_jax.training import replay

# Two hosts train as two slices, then meet a NaN, then are killed.
WHOLE = """
import test_divergence
from xllm_jax.launch import cli

def main():
    made = host_runs.stage(keep=1)
    made.best.metric = 'loss'
    if COUNT == 2:
        made.mesh, made.slices = {{'fsdp': -1}}, {{'data': COUNT}}
    made.validation = host_runs.validation()
    loop.fit(made, {whole!r})
    if COUNT == 2:
        diverge()
        kill()
        loop.fit(host_runs.stage(), {half!r})

def diverge():
    opened = loop.open_batches
    poisoned = lambda *a: test_divergence.Poisoned(opened(*a), a[-1], False, row=1)
    loop.open_batches = poisoned if INDEX else opened
    cli.flags.FLAGS.mark_as_parsed()
    made = host_runs.stage(log_every=4, save_every=100)
    try:
        cli.guard(lambda _: loop.fit(made, {diverged!r}), [])
    except SystemExit as ended:
        print('ENDED', ended.code)
    loop.open_batches = opened

def kill():
    score, seen = loop.Loop.score, []
    def scored(*arguments):
        score(*arguments)
        seen.append(1)
        if len(seen) == {moment}:
            os.kill(os.getpid(), signal.SIGKILL)
    loop.Loop.score = scored
"""
CONTINUE = """
def main():
    loop.fit(host_runs.stage(), {half!r})
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with the runs `one` and `two` of 1 and 2 hosts, and of 2 hosts `diverged` that met a
    NaN and `half` that were killed at a random step."""
    folder, started = tmp_path_factory.mktemp("hosts"), []
    named = {name: str(folder / name) for name in ("half", "diverged")}
    for count, name in ((1, "one"), (2, "two")):
        code = WHOLE.format(whole=str(folder / name), moment=random.randint(3, 6), **named)
        started.append(host_runs.start(count, code, folder / f"{name}-said"))
    one, two = (host_runs.codes(processes) for processes in started)
    assert one == [0], host_runs.said(folder / "one-said", 1)
    # One that dies a moment later may leave because of the other.
    assert -9 in two and set(two) <= {-9, hosts.LOST}, host_runs.said(folder / "two-said", 2)
    return folder


def same_curve(workdir, reference) -> None:
    found, wanted = small_stage.curve(workdir), small_stage.curve(reference)
    assert found.keys() == wanted.keys() == set(range(1, 7))
    np.testing.assert_allclose(list(found.values()), list(wanted.values()), rtol=1e-6)


def test_two_hosts_train_what_one_does(runs):
    same_curve(runs / "two", runs / "one")
    one, two = (checkpoint.open_leaves(runs / name / "final") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        found, wanted = two[path].read().result(), leaf.read().result()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6, err_msg=path)
    abouts = [base_description.base_about(runs / name / "final")["base"] for name in ("one", "two")]
    assert abouts[0] == abouts[1]
    assert sorted(f.name for f in (runs / "two").iterdir()) == [
        "checkpoints",
        "final",
        "metrics.jsonl",
        "tensorboard",
    ]


def test_two_hosts_measure_what_one_does(runs):
    texts = [(runs / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    for one, two in zip(*(map(json.loads, lines) for lines in texts), strict=True):
        assert ("validation/loss" in one) == (one["step"] in (3, 6))
        assert one.get("validation/count") == two.get("validation/count")
        loss = [line.get("validation/loss", 0.0) for line in (one, two)]
        np.testing.assert_allclose(*loss, rtol=1e-6)


def test_the_best_and_the_last_checkpoint_are_kept(runs):
    losses = small_stage.curve(runs / "two")
    means = {step: (losses[step - 1] + losses[step]) / 2 for step in (2, 4, 6)}
    kept = {int(folder.name) for folder in (runs / "two" / "checkpoints").iterdir()}
    assert kept == {6, min(means, key=means.get)}


@pytest.mark.parametrize("count", [1, 4])
def test_another_number_of_hosts_continues(runs, tmp_path, count):
    shutil.copytree(runs / "half", tmp_path / "half")
    code = CONTINUE.format(half=str(tmp_path / "half"))
    codes = host_runs.codes(host_runs.start(count, code, tmp_path / "said"))
    assert codes == [0] * count, host_runs.said(tmp_path / "said", count)
    folders = (runs / "half" / "checkpoints").iterdir()
    saved = [folder.name for folder in folders if folder.name.isdigit()]
    told = re.findall(r"Resumes at micro-batch (\d+)", host_runs.said(tmp_path / "said", count))
    assert told == [max(saved)] * count if saved else told == []
    same_curve(tmp_path / "half", runs / "one")


def test_hosts_diverge_alike_and_each_saves_its_rows(runs):
    """Only the rows of host 1 hold the NaN."""
    said = host_runs.said(runs / "two-said", 2)
    assert said.count("ENDED 3") == said.count("The run diverged") == 2
    files = sorted((runs / "diverged" / "replay").iterdir())
    assert [file.name for file in files] == ["3.host0.npz", "3.host1.npz"]
    one, other = map(replay.read, files)
    assert one.exact and one.rows == other.rows and set(one.rows) == {0, 1, 2, 3}
    assert (one.batch.weights == test_divergence.HUGE).any(axis=1).tolist() == [False] * 3 + [True]
    assert one.rows[3][0] in said.split("The run diverged")[2]


MIXED = """
import json, host_batches
def main():
    print('RESULT' + json.dumps(host_batches.train_on_share(INDEX, COUNT)), flush=True)
"""


def test_text_on_one_host_and_media_on_the_other_run_one_program(tmp_path):
    started = [host_runs.start(count, MIXED, tmp_path / str(count)) for count in (1, 2)]
    codes = [host_runs.codes(processes) for processes in started]
    assert codes == [[0], [0, 0]], host_runs.said(tmp_path / "2", 2)
    results = [
        json.loads(line.removeprefix("RESULT"))
        for count in (1, 2)
        for line in host_runs.said(tmp_path / str(count), count).splitlines()
        if line.startswith("RESULT")
    ]
    assert len(results) == 3
    assert results[0][-1]["loss"] != results[0][0]["loss"]
    for metrics in results[1:]:
        for found, wanted in zip(metrics, results[0], strict=True):
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                np.testing.assert_allclose(found[name], value, rtol=2e-4, err_msg=name)


DIFFERENT = {
    "configuration": (
        "    made.optimizer.peak = 1e-2 * (1 + INDEX)\n",
        ["host 1 has another configuration than host 0", "optimizer.peak is 0.02, on host 0 0.01"],
    ),
    "code": (
        "    sys.path.insert(0, {folder!r})\n"
        "    fingerprint = loop.startup.fingerprint.code\n"
        "    edited = loop.Path({folder!r}) / 'xllm_jax'\n"
        "    compared = edited if INDEX else None\n"
        "    loop.startup.fingerprint.code = lambda: fingerprint(compared)\n",
        ["another code than host 0", "xllm_jax/core/optim.py is "],
    ),
    "data": (
        "    os.makedirs(f'{folder}/{{INDEX}}/texts'); os.chdir(f'{folder}/{{INDEX}}')\n"
        "    said = [{{'from': 'human', 'value': 'a'}}, {{'from': 'gpt', 'value': 'b'}}]\n"
        "    rows = [{{'id': f'{{INDEX}}-{{n}}', 'conversations': said}} for n in range(20)]\n"
        "    loop.Path('texts/train.json').write_text(json.dumps(rows))\n"
        "    made.data.sources['text'] = host_runs.instructions('texts')\n",
        ["another data than host 0", "text: first record is "],
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_hosts_that_differ_stop_and_name_the_difference(what, tmp_path):
    change, words = DIFFERENT[what]
    if what == "code":
        ignored = shutil.ignore_patterns("backbones", "__pycache__")
        shutil.copytree(host_runs.ROOT / "xllm_jax", tmp_path / "xllm_jax", ignore=ignored)
        with (tmp_path / "xllm_jax" / "core" / "optim.py").open("a") as file:
            file.write("# edited\n")
    code = f"import json\ndef main():\n    made = host_runs.stage()\n{change}" + (
        f"    loop.fit(made, {str(tmp_path / 'run')!r})\n"
    )
    code = code.replace("{folder!r}", repr(str(tmp_path))).replace("{folder}", str(tmp_path))
    code = code.replace("{{", "{").replace("}}", "}")
    codes = host_runs.codes(host_runs.start(2, code, tmp_path / "said"))
    assert codes == [2, 2], host_runs.said(tmp_path / "said", 2)
    for index in (0, 1):
        line = (tmp_path / "said" / f"host-{index}.txt").read_text()
        for word in words:
            assert word in line, line
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_leaf_of_another_shape_is_a_difference():
    one = {"llm": {"a": np.zeros((2, 3)), "b": np.zeros(4)}}
    tree = {path: str(leaf.shape) for path, leaf in one["llm"].items()}
    assert hosts.differences(tree, {"a": "(2, 4)"}) == [
        "a is (2, 3), on host 0 (2, 4)",
        "b is (4,), on host 0 absent",
    ]


def test_every_field_of_a_stage_is_in_its_fingerprint():
    before = fingerprint.configuration(small_stage.stage())
    made = small_stage.stage()
    made.data.sources["text"].options["count"] = 201
    after = fingerprint.configuration(made)
    told = hosts.differences(after, before)
    assert told == ["data.sources.text.options.count is 201, on host 0 200"]
    assert before["optimizer.peak"] == "0.01"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        (("10.0.0.1", 2, 0), "no address with a port"),
        (("10.0.0.1:99999", 2, 0), "no address with a port"),
        (("10.0.0.1:1234", None, 0), "--host_count"),
        (("10.0.0.1:1234", 2, None), "--host_index"),
        (("10.0.0.1:1234", 2, 2), "0 to 1"),
        (("auto", 2, None), "--host_count"),
        (("", None, 1), "--host_index"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(given, word):
    with pytest.raises(errors.UserError, match=word):
        flags.check(*given)


def test_the_slow_host_is_the_one_that_waits_for_input():
    beats = {
        "0": ["runs a step", 8, 1],
        "1": [watchdog.INPUT, 7, 1],
        "2": ["runs a step", 7, 1],
    }
    assert watchdog.slowest(beats) == "host 1 waits for input, micro-batch 7"


class LateClient:
    """JAX's coordination service: other hosts' values come while one looks or waits."""

    def __init__(self, late: dict[str, int]):
        self.values, self.late, self.waited = {}, late, []

    def key_value_increment(self, name, by):
        return by

    def key_value_set(self, name, value, allow_overwrite):
        self.values[name] = value

    def key_value_dir_get(self, root):
        found = [(key, value) for key, value in self.values.items() if key.startswith(root)]
        self.come(root)
        return found

    def blocking_key_value_get(self, name, milliseconds):
        self.waited.append(name.rpartition("/")[2])
        root = name.rpartition("/")[0] + "/"
        if name not in self.values:
            self.come(root)
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.values[name]

    def come(self, root):
        """One look or wait later."""
        self.late = {host: looks - 1 for host, looks in self.late.items()}
        self.values |= {f"{root}{host}": "true" for host, looks in self.late.items() if looks <= 0}


@pytest.mark.parametrize("late", [{"1": 1, "2": 1}, {"1": 3, "2": 1}, {"1": 0, "2": 2}])
def test_hosts_meet_whenever_they_come(late):
    client = LateClient(late)
    hosts.meet(hosts.Store(client, 0, 3), "planned")
    assert {"1", "2"} <= set(client.waited) and max(client.late.values()) <= 0
