"""The conformance kit: packaged networks pass it, and each seeded fault is caught by its check."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import conformance_networks
import forked
import pytest
import virtual_devices

from xllm_jax.conformance import kit, plugin, subject
from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Part

ROOT = Path(__file__).parents[1]
BUGS = conformance_networks.BUGS


@pytest.fixture(scope="module")
def found():
    """What `conformance_check.py` printed on 8 virtual devices."""
    environment = virtual_devices.environment(8) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = forked.run(
        [sys.executable, "tests/conformance_check.py"],
        capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def outcomes(results, outcome):
    return {name: text for name, (ended, text) in results.items() if ended == outcome}


def test_packaged_networks_pass(found):
    assert {"llm", "llama", "vision_encoder", "whisper", "perceiver"} <= found["clean"].keys()
    for name, results in found["clean"].items():
        assert outcomes(results, "failed") == {}, name
        assert len(outcomes(results, "passed")) >= 8, name
        assert all(outcomes(results, "not applicable").values()), name


@pytest.mark.parametrize("name", BUGS)
def test_a_fault_is_caught_by_its_check(found, name):
    failed = outcomes(found["bugs"][name], "failed")
    assert BUGS[name].check in failed and failed[BUGS[name].check]


def test_every_check_has_a_fault_that_it_catches():
    """What nothing fails may be unable to fail."""
    names = {name for role in (subject.LLM, subject.ENCODER) for name in kit.checks_of(role)}
    assert names == {bug.check for bug in BUGS.values()}


def test_the_page_names_each_fault_and_what_catches_it():
    page = (ROOT / "docs" / "conformance.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| `([^`|]+)` \|", page, re.M))
    for name, bug in BUGS.items():
        assert rows.get(name) == bug.check, name


def test_the_fixture_runs_the_kit(conformance):
    """As in a package of one's own; a function is named by its module."""
    with pytest.raises(pytest.fail.Exception) as caught:
        conformance(conformance_networks.faulty, checks=("padding", "sharding rows"))
    told = str(caught.value)
    assert "conformance_networks:faulty (encoder)" in told
    assert re.search(r"padding +failed +6 places without 6 of padding", told)
    assert re.search(r"sharding rows +passed +3 rows, 3 parameters", told)


def test_the_command():
    """Several networks in one process; a failure is exit code 1."""
    done = command("conformance_networks:sensor", "conformance_networks:faulty", "--checks=padding")
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        "conformance_networks:sensor (encoder)",
        "  padding  passed",
        "conformance_networks:faulty (encoder)",
        "  padding  failed  6 places without 6 of padding: differs by 0.14 of the largest value, "
        "allowed is 2e-05",
    ]


def test_what_the_command_does_not_know_is_one_line():
    done = command("conformance_networks:sensor", "--checks=paddin")
    assert done.returncode == 2 and done.stdout == ""
    assert "no check 'paddin'. Choices: shapes" in done.stderr and done.stderr.count("\n") == 1


def command(*arguments):
    """Runs `xllm conformance` where a user's modules lie."""
    return forked.run(
        [sys.executable, "-m", "xllm_jax.launch.commands", "conformance", *arguments],
        capture_output=True, text=True, cwd=ROOT / "tests", env=virtual_devices.environment(1),
    )  # fmt: skip


def test_pytest_finds_the_plugin():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert told["project"]["entry-points"]["pytest11"] == {"xllm_conformance": plugin.__name__}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lm", "no network 'lm'"),
        ("vit.Vision", "has no 'Vision'"),
        ("no_such_package:network", "cannot be imported"),
        ("conformance_networks:SHARDING", "gives a tuple"),
        ("asr.ASRDecoder", "ASRDecoder is no LLM, encoder or interface"),
    ],
)
def test_bad_names_are_one_line(name, message):
    with pytest.raises(UserError, match=message):
        subject.role(subject.find(name, {"llm": subject.Subject(Part())}).network())
