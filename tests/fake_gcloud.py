"""Stands for gcloud: queued resources whose workers are folders of this machine.

Options are those of the real commands; any other is refused. `ssh` runs the command in one process
a worker with the environment of a TPU VM. State lies in $FAKE_CLUSTER: `state`, `calls`, one folder
a worker; `preempt`, when a test puts it there, takes the slices away after the next training.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ["FAKE_CLUSTER"])
STATE = FOLDER / "state"
WORKERS = [FOLDER / f"worker-{index}" for index in range(2)]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    verbs = made.add_subparsers(dest="verb", required=True)
    options = {
        "create": ("accelerator-type", "runtime-version", "node-count", "node-prefix", "node-id"),
        "describe": ("format",),
        "delete": (),
        "ssh": ("node", "worker", "command"),
        "scp": ("node", "worker"),
    }
    for verb, names in options.items():
        sub = verbs.add_parser(verb, allow_abbrev=False)
        sub.add_argument("names", nargs="+")
        for name in (*names, "zone", "project"):
            sub.add_argument(f"--{name}")
        for name in ("quiet", "spot", "reserved", "force"):
            sub.add_argument(f"--{name}", action="store_true")
    return made


def main() -> int:
    assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"], sys.argv
    asked = parser().parse_args(sys.argv[4:])
    with (FOLDER / "calls").open("a") as calls:
        calls.write(" ".join(sys.argv[4:]) + "\n")
    if asked.verb == "create":
        return create()
    if not STATE.exists():
        print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
        return 1
    return {"describe": describe, "delete": delete, "ssh": ssh, "scp": scp}[asked.verb](asked)


def create() -> int:
    assert not STATE.exists(), "created twice"
    for worker in WORKERS:
        worker.mkdir()
    STATE.write_text("PROVISIONING")
    return 0


def describe(asked: argparse.Namespace) -> int:
    state = STATE.read_text()
    print(state)
    if state == "PROVISIONING":
        STATE.write_text("ACTIVE")
    return 0


def delete(asked: argparse.Namespace) -> int:
    STATE.unlink()
    for worker in WORKERS:
        shutil.rmtree(worker, ignore_errors=True)
    return 0


def scp(asked: argparse.Namespace) -> int:
    source, target = asked.names
    for worker in WORKERS:
        shutil.copy(source, worker / target.partition(":")[2])
    return 0


def ssh(asked: argparse.Namespace) -> int:
    assert (asked.node, asked.worker) == ("all", "all")
    if STATE.read_text() != "ACTIVE":
        return 255
    running = [
        subprocess.Popen(["bash", "-c", asked.command], cwd=home, env=environment(index))
        for index, home in enumerate(WORKERS)
    ]
    codes = [process.wait() for process in running]
    plan = FOLDER / "preempt"
    if "follow" in asked.command and plan.exists():
        plan.unlink()
        STATE.write_text("SUSPENDED")
        return 255
    return next((code for code in codes if code), 0)


def environment(index: int) -> dict[str, str]:
    """Two slices of one host each, as Cloud TPU describes them."""
    return os.environ | {
        "HOME": str(WORKERS[index]),
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "127.0.0.1",
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": str(index),
        "JAX_FORCE_TPU_INIT": "1",  # how JAX learns that this is a TPU VM
    }


if __name__ == "__main__":
    sys.exit(main())
