"""What README and docs name exists: paths, tests, commands, flags, fields of stages."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Stage
from xllm_jax.core.suite import Suite
from xllm_jax.launch import cli, commands, dict_overrides, suite_models

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TOPS = ("xllm_jax", "configs", "launch", "docs", "tests", "benchmarks")
ROOMS = tuple(ROOT / name for name in (".", "xllm_jax", "tests", "docs", "launch", "launch/gke"))
PAGE_IDS = [page.name for page in PAGES]


def code(text: str) -> list[str]:
    """Inline code, and the lines of code blocks without comments, continued lines joined."""
    found, prose = [], []
    for number, part in enumerate(text.split("```")):
        if number % 2:
            found += [re.sub(r"\s+# .*", "", one) for one in part.replace("\\\n", " ").splitlines()]
        else:
            prose += re.findall(r"`([^`\n]+)`", part)
    return found + prose


def paths(text: str) -> Iterator[str]:
    """Names that look like paths of this repository, and targets of links."""
    yield from (t for t in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in t)
    for piece in code(text):
        for word in re.split(r"[\s=,()'\"]+|:tiny\b", piece):
            file = re.fullmatch(r"(?:\w+/)*\w+\.(?:py|md|sh|sbatch)(?:::\w+)?", word)
            if file or (word.split("/")[0] in TOPS and "/" in word and "…" not in word):
                yield word


def exists(page: Path, name: str) -> bool:
    """Whether a path is there, and the test in it when it names one."""
    file, _, test = name.partition("::")
    for room in (page.parent, *ROOMS):
        for found in sorted(room.glob(file.rstrip("/"))):
            if not test or f"def {test}(" in found.read_text():
                return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_path_exists(page):
    mine = {"mine.py", "NAME.py"}  # files of the reader
    named = set(paths(page.read_text())) - mine
    assert sorted(name for name in named if not exists(page, name)) == []


def flags_of(command: str) -> set[str]:
    """Names of the flags that a command defines or adopts, with the negation of its switches."""
    found = {"help"}
    for module in (commands.COMMANDS[command], "hosts"):
        for node in ast.walk(ast.parse((ROOT / "launch" / f"{module}.py").read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if called and node.func.attr == "adopt_module_key_flags":
                assert isinstance(node.args[0], ast.Name)
                adopted = ROOT / "launch" / f"{node.args[0].id}.py"
                found |= defined(adopted) if adopted.is_file() else set()
        found |= defined(ROOT / "launch" / f"{module}.py")
    return found | ({"image", "video", "speech"} if command == "generate" else set())


def defined(module: Path) -> set[str]:
    """Names of the flags that a module defines, with the negation of its switches."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if called and node.func.attr.startswith("DEFINE_"):
            words = [node.args[0]] if isinstance(node.args[0], ast.Constant) else []
            found |= {word.value for word in words}
            if node.func.attr == "DEFINE_bool":
                found |= {f"no{word.value}" for word in words}
    return found


def shown() -> list[tuple[str, str, list[str]]]:
    """(page, command, arguments) of every `xllm COMMAND --…` in the pages."""
    found = []
    for page in PAGES:
        for piece in code(page.read_text()):
            match = re.search(r"(?:^|\s)xllm ([\w-]+)(.*)", piece)
            if match and match[1] not in ("COMMAND", "--help"):
                text = re.split(r"\s[|&>]\s", match[2])[0]
                found.append((page.name, match[1], shlex.split(text)))
    return found


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_flag_of_a_command_exists(command):
    known = flags_of(command) | {"config", "flagfile"}  # absl has the latter for every command
    for page, name, arguments in shown():
        if name == command:
            for word in arguments:
                flag = re.match(r"\[?--(\w+)", word)
                assert flag is None or flag[1] in known, f"{page}: xllm {command} {word}"


def test_every_command_exists():
    assert {command for _, command, _ in shown()} <= commands.COMMANDS.keys()


@pytest.fixture(scope="module")
def stages() -> list[Stage | Suite]:
    """Every packaged stage and suite at both sizes."""
    suites = [f"suites.{name}" for name in suite_models.SUITES]
    names = [*cli.packaged_stages(), *suites]
    modules = [importlib.import_module(f"xllm_jax.configs.{name}") for name in names]
    return [module.get_config(size) for module in modules for size in ("tiny", "real")]


def has(stage: Stage | Suite, token: str) -> bool:
    """Whether a stage has the field that a flag sets."""
    try:
        _, settings = dict_overrides.take([token], {"config": stage})
    except UserError:  # a weight of a source of other stages
        return False
    path = token.lstrip("-").partition("=")[0].split(".")
    return bool(settings) or cli.unknown_field(stage, path) is None


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_every_field_of_a_stage_exists(page, stages):
    pieces = (shlex.split(p) for p in code(page.read_text()) if "--config." in p)
    tokens = {word for piece in pieces for word in piece if word.startswith("--config.")}
    for token in sorted(tokens):
        open_ended = re.search(r"\.[A-Z_]+\b|…|\.\.", token.partition("=")[0])
        assert open_ended or any(has(stage, token) for stage in stages), token
