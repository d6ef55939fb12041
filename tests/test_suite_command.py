"""`xllm evaluate --suite=…` from its flags to its files, and what it refuses."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import forked
import pytest
import small_runs
import small_speech
import suite_data

from xllm_jax.configs import stage3_instruction
from xllm_jax.configs.suites import asr as asr_config
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.suite import Suite
from xllm_jax.launch import cli, suite_models

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A finished ASR run of very small networks, and an AISHELL-2 test set of three sounds."""
    found = tmp_path_factory.mktemp("suite")
    stage, examples = small_speech.make(found)
    small_runs.write_run(dataclasses.replace(stage, profile=()), found / "run", tuple(stage.parts))
    place = found / "AISHELL-DEV-TEST-SET/iOS/test"
    place.mkdir(parents=True)
    names = [Path(example.media[0][1]).name for example in examples[:3]]
    for name in names:
        (place / name).write_bytes((found / name).read_bytes())
    (place / "wav.scp").write_text("\n".join(f"U{n}\t{name}" for n, name in enumerate(names)))
    said = "\n".join(f"U{n}\t{e.answer}" for n, e in enumerate(examples[:3]))
    (place / "trans.txt").write_text(said, "utf-8")
    (place / names[1]).write_bytes(b"no sound")
    return found


def evaluate(*arguments: str, folder: Path) -> subprocess.CompletedProcess:
    """The command, with what it prints."""
    return forked.xllm("evaluate", *arguments, cwd=folder)


def test_a_run_is_evaluated_on_a_published_layout(folder):
    done = evaluate(
        "--suite=asr",
        "--checkpoint=run",
        "--output=out",
        "--config.root=.",
        "--config.only=('test_ios',)",
        "--config.sets.test_ios.path=AISHELL-DEV-TEST-SET/iOS",
        "--rows=2",
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    assert "Character error rate" in done.stdout and "results.html" in done.stdout
    found = suite_data.results(folder / "out")["sets"]["test_ios"]
    assert (found["samples"], found["failed"]) == (3, 1)
    assert found["errors"]["deleted"] >= 5 and list(found["speakers"]) == ["test"]


@pytest.mark.parametrize(
    "given, wanted",
    [
        (["--suite=asr"], "asr.py"),
        (["--suite=vqa:tiny", "--limit=3"], "vqa.py:tiny"),
        (["--suite=asr", "--config=mine.py"], ""),
        (["--runs=runs"], ""),
    ],
)
def test_a_suite_finds_its_configuration(given, wanted):
    made = suite_models.with_config(["evaluate", *given])
    added = [token for token in made if token not in given][1:]
    assert made[0] == "evaluate" and len(added) == bool(wanted)
    assert all(token.endswith(f"/suites/{wanted}") and token == made[1] for token in added)


def test_an_unknown_suite_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        suite_models.with_config(["evaluate", "--suite=asl"])
    assert ended.value.code == 2
    assert "--suite: no such suite 'asl'. Did you mean asr?" in capsys.readouterr().err


def test_a_suite_is_no_stage_and_a_stage_no_suite():
    suite = asr_config.get_config()
    cli.check_settings("config", suite, Suite)
    for made, kind in ((suite, Stage), (stage3_instruction.get_config("tiny"), Suite)):
        with pytest.raises(UserError, match=f"Let it return a {kind.__name__}"):
            cli.check_settings("config", made, kind)
    with pytest.raises(UserError, match="shard: cannot be 0"):
        cli.check_settings("config", dataclasses.replace(suite, shard=0), Suite)
    assert cli.unknown_field(suite, ["config", "lengts"]).endswith("Did you mean lengths?")


def test_a_mistake_is_one_line(folder):
    done = evaluate("--suite=asr", "--checkpoint=else", folder=folder)
    assert done.returncode == 2 and done.stderr.startswith("else: no finished run here")
    assert len(done.stderr.splitlines()) == 1
