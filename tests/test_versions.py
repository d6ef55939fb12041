"""The lock: it fits what is asked for, names no machine, and every way to install goes by it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


def lines(text: str) -> list[str]:
    """What is left of a requirements file without comments."""
    found = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in found if line]


def locked(python: str) -> dict[str, Version]:
    """{package: version} that the lock gives a Python on Linux."""
    about = {"python_version": python, "python_full_version": f"{python}.0"}
    about |= {"sys_platform": "linux", "platform_machine": "x86_64"}
    found = {}
    for line in lines((ROOT / "requirements.lock").read_text()):
        one = Requirement(line)
        if one.marker is None or one.marker.evaluate(about):
            (pin,) = one.specifier
            assert pin.operator == "==" and canonicalize_name(one.name) not in found
            found[canonicalize_name(one.name)] = Version(pin.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_holds_all_that_is_asked_for(python):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = lines((ROOT / "requirements.txt").read_text())
    for extra in project["optional-dependencies"].values():
        asked += extra
    found = locked(python)
    for line in asked:
        one = Requirement(line)
        if canonicalize_name(one.name) == canonicalize_name(project["name"]):  # extras of ours
            assert one.extras <= project["optional-dependencies"].keys()
            continue
        assert one.specifier.contains(found[canonicalize_name(one.name)]), line


def test_the_lock_has_jax_for_every_python():
    minor = {python: locked(python)["jax"].release[:2] for python in PYTHONS}
    assert minor == {"3.11": (0, 10), "3.12": (0, 12), "3.13": (0, 12)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    stated = {c.rpartition(" ")[2] for c in project["classifiers"] if ":: Python ::" in c}
    assert stated == set(PYTHONS)


def test_the_lock_names_no_registry_and_no_machine():
    assert not re.search(
        r"://|file:|^-|@ |/(home|tmp|opt)/", (ROOT / "requirements.lock").read_text()
    )


@pytest.mark.parametrize("name", ["Makefile", "launch/worker.sh", "launch/gke/Dockerfile"])
def test_every_installation_goes_by_the_lock(name):
    text = (ROOT / name).read_text().replace("\\\n", " ")
    installs = [
        line for line in text.splitlines() if re.search(r"pip install.* (-r|-e|\$\(1\))", line)
    ]
    assert installs
    for line in installs:
        locked = "requirements.lock" in line
        assert locked or "--no-deps" in line, line
