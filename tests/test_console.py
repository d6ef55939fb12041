"""The console command `xllm`, and the wheel that brings it into an empty environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli, commands

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")
FOLDERS = ("xllm_jax", "configs", "launch")


def xllm(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own and checks its exit code."""
    command = [sys.executable, "-m", "xllm_jax.launch.commands", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr
    return done


def test_the_overview_lists_every_command_with_a_line_and_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from xllm_jax.launch import commands\n"
        "commands.main(['--help'])\n"
        "print([m for m in ('jax', 'numpy', 'absl', 'ml_collections') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    listed = dict(line.split(maxsplit=1) for line in lines if line.startswith("  "))
    assert listed.keys() == commands.COMMANDS.keys()
    assert all(text.endswith(".") for text in listed.values())
    assert max(map(len, lines)) <= 120


def test_every_script_of_launch_is_a_command():
    scripts = {p.stem for p in (ROOT / "launch").glob("*.py") if "cli.run(main" in p.read_text()}
    assert set(commands.COMMANDS.values()) == scripts


@pytest.mark.parametrize(
    ("name", "hint"), [("trian", "Did you mean train?"), ("zzz", "Choices: demo, train,")]
)
def test_an_unknown_command_is_one_line(name, hint):
    done = xllm(name, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"xllm {name}: unknown command. {hint}")


def test_the_help_of_a_command_shows_its_flags_and_those_of_hosts():
    done = xllm("train", "--help")
    assert done.stdout.startswith("Trains one stage.") and done.stderr == ""
    for flag in ("--config", "--workdir", "--hosts", "--host_count", "--host_index"):
        assert f"  {flag}: " in done.stdout


def test_a_mistake_in_a_command_is_one_line():
    done = xllm("replay", "--fiel=x", code=2)
    assert done.stderr == "--fiel: unknown flag. Did you mean --file?\n"


@pytest.mark.parametrize(
    ("name", "given"),
    [("train", ["--config", "world_llm:tiny"]), ("train", ["-config=world_llm:tiny"])],
)
def test_a_stage_is_found_by_its_name(name, given):
    """`--workdir` is what is missing: the stage was found."""
    done = xllm(name, *given, "--config.steps=1", code=2)
    assert done.stderr.startswith("--workdir: this flag is required.")


def test_a_file_goes_before_a_packaged_stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged = cli.packaged_stages()
    assert {"networks", "sources"}.isdisjoint(packaged) and "stage2_image" in packaged
    assert cli.locate("config", "stage2_image:tiny") == f"{packaged['stage2_image']}:tiny"
    (tmp_path / "mine.py").write_text("")
    assert cli.locate("config", "mine.py:tiny") == "mine.py:tiny"
    for wrong, words in (
        ("stage2_imag", "no such stage: stage2_imag. Did you mean stage2_image?"),
        ("mind.py", r"no such file: mind\.py. Did you mean mine\.py?"),
        ("no/mine.py", "Give the path of a stage file"),
    ):
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            cli.locate("config", wrong)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=skip)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    options = ("--no-deps", "--no-index", "--no-build-isolation", f"--wheel-dir={folder}")
    run(sys.executable, "-m", "pip", "wheel", *options, folder / "source")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """An empty environment with the wheel; what it depends on comes from where this test runs."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = site_packages(folder)
    assert list(site.iterdir()) == []
    run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel
    )
    names = sorted(p.name for p in site.iterdir())
    assert [n for n in names if not n.endswith(".dist-info")] == ["xllm_jax"]
    # Plain paths: the .pth files in them, such as that of an editable install, are not read.
    others = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    (site / "dependencies.pth").write_text("\n".join(others) + "\n")
    return folder


def site_packages(environment: Path) -> Path:
    """The folder of an environment's packages."""
    (found,) = (environment / "lib").glob("python*/site-packages")
    return found


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """Runs a program that has to succeed; its output."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_one_package_with_its_stages_and_backbones(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0].split("-")[0] for n in names} == {"xllm_jax"}
    for file in ("configs/stage2_image.py", "launch/train.py", "launch/gke/render.py", "py.typed"):
        assert f"xllm_jax/{file}" in names
    backbones = ROOT / "xllm_jax" / "data" / "synthetic_world" / "backbones"
    shipped = {str(p.relative_to(ROOT)) for p in backbones.rglob("*") if p.is_file()}
    assert shipped and shipped <= set(names)


def test_a_stage_trains_outside_of_the_checkout(environment, tmp_path):
    program = environment / "bin" / "xllm"
    run(program, "build-backbones", "--output=bases", cwd=tmp_path)
    small = ("--config.steps=2", "--config.unroll=1", "--config.data.examples=8")
    run(program, "train", "--config=world_llm:tiny", "--workdir=runs/two", *small, cwd=tmp_path)
    lines = (tmp_path / "runs" / "two" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert (tmp_path / "runs" / "two" / "final").is_dir()
    where = run(
        environment / "bin" / "python",
        "-c",
        "import xllm_jax.configs.networks as m; print(m.__file__)",
        cwd=tmp_path,
    )
    assert Path(where.strip()).is_relative_to(site_packages(environment))
