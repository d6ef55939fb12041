"""Stands for sbatch, srun, squeue and scontrol: a cluster of two nodes with one task each.

Options that the real commands do not know are refused. Tasks are processes of this machine with the
variables that SLURM sets. State lies in $FAKE_CLUSTER: `calls`, `state` (what squeue tells; RUNNING
when it is not there), `requeue`; `time-limit`, when a test puts it there, holds the words in a
task's output at which the job's time is over.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_CLUSTER"])
DIRECTIVES = ("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time")
DIRECTIVES += ("signal", "open-mode", "output")
NODES = 2


def options(names: tuple[str, ...], arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}")
    parser.add_argument("--requeue", action="store_true")
    parser.add_argument("--noheader", action="store_true")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    found = parser.parse_args(arguments)
    return found, found.rest


def sbatch(arguments: list[str]) -> int:
    """Runs the job, again whenever it was requeued; returns its last exit code."""
    asked, (script, *rest) = options(DIRECTIVES, arguments)
    lines = re.findall(r"^#SBATCH (.*)$", Path(script).read_text(), re.MULTILINE)
    written, _ = options(DIRECTIVES, lines)
    assert written.requeue and written.signal.startswith("TERM@")
    environment = os.environ | {
        "SLURM_JOB_NAME": asked.job_name or written.job_name,
        "SLURM_SUBMIT_DIR": os.getcwd(),
        "SLURM_JOB_NODELIST": "localhost,other",
    }
    spool = FOLDER / "slurm_script"
    spool.write_bytes(Path(script).read_bytes())
    for restart in range(9):
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        code = subprocess.run(["bash", str(spool), *rest], cwd="/", env=environment).returncode
        if not (FOLDER / "requeue").exists():
            return code
        (FOLDER / "requeue").unlink()
    raise AssertionError("requeued without end")


def srun(arguments: list[str]) -> int:
    """Returns the highest exit code of the tasks, as SLURM does."""
    asked, command = options(("kill-on-bad-exit", "wait", "open-mode", "output"), arguments)
    assert asked.open_mode == "append"
    logs = [Path(asked.output.replace("%t", str(task))) for task in range(NODES)]
    tasks = [start(task, command, log) for task, log in enumerate(logs)]
    limit = FOLDER / "time-limit"
    with logs[0].open("a") as log:
        for line in io.TextIOWrapper(tasks[0].stdout):  # a progress bar's lines end here, too
            log.write(line)
            if limit.exists() and limit.read_text() in line:
                limit.unlink()
                for task in tasks:  # the processes that SLURM started, not their children
                    task.terminate()
    return max(task.wait() for task in tasks)


def start(task: int, command: list[str], log: Path) -> subprocess.Popen:
    """One task; the output of the first is read by srun."""
    environment = os.environ | {
        "SLURM_PROCID": str(task),
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": str(NODES),
        "SLURM_STEP_NUM_NODES": str(NODES),
        "SLURM_STEP_NODELIST": "localhost,other",
    }
    with log.open("a") as file:
        output = file if task else subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def squeue(arguments: list[str]) -> int:
    asked, _ = options(("jobs", "format"), arguments)
    assert (asked.jobs, asked.format) == (os.environ["SLURM_JOB_ID"], "%T")
    state = FOLDER / "state"
    print(state.read_text() if state.exists() else "RUNNING")
    return 0


def scontrol(arguments: list[str]) -> int:
    assert arguments == ["requeue", os.environ["SLURM_JOB_ID"]]
    (FOLDER / "requeue").touch()
    return 0


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    with (FOLDER / "calls").open("a") as calls:
        calls.write(" ".join([name, *rest]) + "\n")
    sys.exit({"sbatch": sbatch, "srun": srun, "squeue": squeue, "scontrol": scontrol}[name](rest))
