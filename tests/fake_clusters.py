"""A machine on whose PATH gcloud, SLURM and kubectl are the fakes beside this file."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
COMMANDS = {
    "gcloud": "fake_gcloud.py",
    "kubectl": "fake_kubectl.py",
    "sbatch": "fake_slurm.py sbatch",
    "srun": "fake_slurm.py srun",
    "squeue": "fake_slurm.py squeue",
    "scontrol": "fake_slurm.py scontrol",
}
# What a worker's set-up needs from outside: uv, whose environment is the one the tests run in.
UV = f"""#!/bin/bash
for last; do :; done
if [[ $1 == venv ]]; then
  mkdir -p "$last/bin"
  printf '#!/bin/bash\\nexec {sys.executable} "$@"\\n' > "$last/bin/python"
  chmod +x "$last/bin/python"
fi
"""
# Stands for launch/train.py where only its exit codes matter: --codes has those of its starts, host
# by host in the shared folder; 'join' meets the other hosts as launch/hosts.py does, 'wait' tells
# that it runs and waits for SIGTERM.
TRAIN = """
import os, signal, sys
from pathlib import Path

flags = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
names = ("SLURM_PROCID", "MEGASCALE_SLICE_ID", "JOB_COMPLETION_INDEX")
host = next(os.environ[name] for name in names if name in os.environ)
workdir = Path(flags["workdir"])
workdir.mkdir(parents=True, exist_ok=True)
with (workdir / f"starts-{host}").open("a+") as starts:
    starts.seek(0)
    number = len(starts.readlines())
    starts.write("start\\n")
codes = flags["codes"].split(",")
code = codes[min(number, len(codes) - 1)]
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    open(Path(os.environ["FAKE_CLUSTER"]) / f"ready-{host}", "w").close()
    signal.pause()
if code != "join":
    print("ends with", code)
    sys.exit(int(code))
import jax, numpy
from jax.experimental import multihost_utils
from xllm_jax.core import hosts
address = "" if flags["hosts"] == "auto" else flags["hosts"]
count, index = (int(flags[name]) if address else None for name in ("host_count", "host_index"))
hosts.join(address, count, index)
total = multihost_utils.process_allgather(numpy.array([10 ** jax.process_index()])).sum()
(workdir / f"result-{jax.process_index()}").write_text(f"{jax.process_count()} hosts, {total}")
"""


@dataclasses.dataclass
class Machine:
    """Where a test runs the scripts.

    Attributes:
      folder: state of the fakes.
      checkout: git repository with the scripts and the stand-in for launch/train.py.
      environment: variables of every command.
    """

    folder: Path
    checkout: Path
    environment: dict[str, str]

    def run(self, *command: str, **more: object) -> subprocess.CompletedProcess:
        """Runs a command in the checkout."""
        return subprocess.run(
            command,
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
            **more,
        )

    def calls(self, start: str) -> list[str]:
        """What was asked of the fakes, beginning with `start`."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(start)]


def make(folder: Path) -> Machine:
    """Builds the machine below `folder`."""
    bin = folder / "bin"
    bin.mkdir()
    for name, script in COMMANDS.items():
        _program(bin / name, f'#!/bin/bash\nexec {sys.executable} {TESTS}/{script} "$@"\n')
    _program(bin / "uv", UV)
    _program(bin / "python", f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    _program(bin / "hostname", '#!/bin/bash\necho "worker-$MEGASCALE_SLICE_ID"\n')
    cluster = folder / "cluster"
    cluster.mkdir()
    environment = os.environ | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FAKE_CLUSTER": str(cluster),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "FAKE_ADDRESS": f"127.0.0.1:{free_port()}",
        "XLLM_PYTHON": sys.executable,
    }
    return Machine(cluster, _checkout(folder / "checkout"), environment)


def _program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def _checkout(folder: Path) -> Path:
    names = ("run_with_exit_code.sh", "slurm.sbatch", "tpu_pod.sh", "exit_codes.sh", "worker.sh")
    (folder / "launch").mkdir(parents=True)
    for name in names:
        shutil.copy(ROOT / "launch" / name, folder / "launch")
    (folder / "launch" / "train.py").write_text(TRAIN)
    git = ("git", "-c", "user.name=test", "-c", "user.email=test@localhost")
    for command in (("init", "-q"), ("add", "."), ("commit", "-q", "-m", "scripts")):
        subprocess.run([*git, *command], cwd=folder, check=True)
    return folder


def free_port(first: int = 0, last: int = 0) -> int:
    """A port that nobody listens on, of a range when it is given."""
    for port in range(first, last + 1):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError(f"no free port from {first} to {last}")
