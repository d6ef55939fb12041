"""Values that reach a shell or a manifest arrive as they were written, and start nothing."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from xllm_jax.core.errors import UserError
from xllm_jax.launch.gke import jobset
from xllm_jax.preflight import targets

LAUNCH = Path(__file__).parents[1] / "launch"
NAMES = ("--name=pod", "--zone=here")
NASTY = "a b; touch pwned #$(touch pwned)`touch pwned`'\"\\&|*"


def stand_in(folder: Path, name: str, lines: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
    (folder / name).chmod(0o755)


def pod(tmp_path, *arguments):
    """(tpu_pod.sh when it has ended, the command that a worker would run)."""
    said = tmp_path / "said"
    stand_in(
        tmp_path / "bin",
        "gcloud",
        f'for a; do [[ $a != --command=* ]] || printf %s "${{a#--command=}}" > {said}; done',
    )
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "tpu_pod.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    return done, said.read_text() if said.exists() else ""


def on_a_worker(tmp_path, command):
    """Words of every call of git and of the worker's script."""
    home, calls = tmp_path / "home", tmp_path / "calls"
    home.mkdir()
    for name in ("git", "bash"):
        words = f'for a; do printf "%s\\0" "$a"; done >> {calls}; printf "\\n" >> {calls}'
        stand_in(tmp_path / "far", name, f"{words}\n[[ $1 != clone ]] || mkdir new")
    environment = {"PATH": f"{tmp_path / 'far'}:/usr/bin:/bin", "HOME": str(home)}
    subprocess.run(["/bin/bash", "-c", command], cwd=home, env=environment, check=True)
    assert not list(tmp_path.rglob("pwned"))
    return [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


SOURCES = {
    "https://host/x/y": ("https://host/x/y", ""),
    "https://host/x/y@main": ("https://host/x/y", "main"),
    "https://me:key@host/x/y.git": ("https://me:key@host/x/y.git", ""),
    "https://me:key@host/x/y.git@feature/a@b": ("https://me:key@host/x/y.git", "feature/a@b"),
    "git@host:x/y.git": ("git@host:x/y.git", ""),
    "git@host:x/y.git@v1.0": ("git@host:x/y.git", "v1.0"),
    "ssh://git@host/x/y@0a1b2c": ("ssh://git@host/x/y", "0a1b2c"),
    "/srv/x@main": ("/srv/x", "main"),
    f"https://host/{NASTY}@{NASTY}": (f"https://host/{NASTY}", NASTY),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_repository_reaches_git_as_it_was_written(source, tmp_path):
    done, command = pod(tmp_path, "setup", *NAMES, "--folder=/shared", f"--source={source}")
    assert done.returncode == 0, done.stderr
    url, ref = SOURCES[source]
    clone, *checkout, _ = on_a_worker(tmp_path, command)
    assert clone == ["clone", "--quiet", "--", url, "new"]
    assert checkout == ([["-C", "new", "checkout", "--quiet", ref, "--"]] if ref else [])


def test_a_folder_and_flags_reach_the_worker_as_they_were_written(tmp_path):
    arguments = (f"--folder=/{NASTY}", "--source=https://host/x")
    _, command = pod(tmp_path, "setup", *NAMES, *arguments)
    script = ["xllm_jax/launch/worker.sh", "setup", "folder", f"/{NASTY}"]
    assert on_a_worker(tmp_path, command)[-1] == script
    (tmp_path / "calls").unlink()
    (tmp_path / "home").rename(tmp_path / "before")
    _, command = pod(tmp_path, "start", *NAMES, "--", f"--config.name={NASTY}", "--x=a b")
    assert shlex.split(command)[:3] == ["bash", "xllm_jax/launch/worker.sh", "start"]
    words = on_a_worker(tmp_path, command)[0]
    assert words == ["xllm_jax/launch/worker.sh", "start", f"--config.name={NASTY}", "--x=a b"]


@pytest.mark.parametrize(
    "option",
    [
        "--source=--upload-pack=touch pwned",
        "--source=ext::sh -c touch% pwned",
        "--source=https://host/x@--orphan",
        "--source=https://host/x@",
        "--bucket=-o allow_other",
        "--bucket=b; touch pwned",
    ],
)
def test_options_in_the_place_of_values_are_refused(option, tmp_path):
    folder = () if option.startswith("--bucket") else ("--folder=/shared",)
    done, command = pod(tmp_path, "setup", *NAMES, *folder, option)
    assert done.returncode == 2 and not command
    assert done.stderr.startswith(option.partition("=")[0]) and done.stderr.count("\n") == 1


def test_flags_reach_a_pod_as_they_were_written():
    """Kubernetes makes one $ of two, and puts in what $(NAME) names."""
    train = "'--config.name=$(JOB_COMPLETION_INDEX) $HOME' --x=$$(y)"
    run = jobset.Run(
        "n", targets.parse("h100:16"), "image", jobset.arguments(train), bucket="bucket"
    )
    (container,) = jobset.pod(run)["spec"]["containers"]
    wanted = ["--config.name=$$(JOB_COMPLETION_INDEX) $$HOME", "--x=$$$$(y)"]
    assert container["args"][-2:] == wanted
    assert "--host_index=$(JOB_COMPLETION_INDEX)" in container["args"]


@pytest.mark.parametrize("field", ["bucket", "claim", "account"])
def test_names_of_a_cluster_are_names(field):
    fields = {"bucket": "b"} if field == "account" else {}
    fields |= {"arguments": (), field: "x: y\n- z"}
    run = jobset.Run("n", targets.parse("h100:16"), "image", **fields)
    with pytest.raises(UserError, match="is no name"):
        jobset.check(run)
