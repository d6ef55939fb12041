"""The scripts for TPU pods and SLURM, run whole against fakes that start two real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import fake_clusters
import pytest
import small_stage

from xllm_jax.core import hosts
from xllm_jax.launch import hosts as launch_hosts

LAUNCH = fake_clusters.ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
RUN = ("--name=pod", "--zone=here", "--type=v5e-16", "--slices=2", "--spot", "--poll=0")
STEPS = 40
SMALL = f"""
import sys
sys.path.insert(0, {str(fake_clusters.TESTS)!r})
import small_stage
from xllm_jax.core import progress

progress.SECONDS = 0.0  # a line at every step, so that the time limit can be at one

def get_config():
    made = small_stage.stage(unroll=1, steps={STEPS}, save_every=1000)
    made.parts["llm"].fields |= {{"depth": 1, "width": 16, "hidden": 32}}
    made.data.examples, made.data.rows, made.data.length = 8, 4, 64
    return made
"""
REAL = f"""
import runpy
runpy.run_path({str(LAUNCH / "train.py")!r}, run_name="__main__")
"""


@pytest.fixture
def machine(tmp_path):
    return fake_clusters.make(tmp_path)


def pod(machine, codes: str, *options: str):
    """tpu_pod.sh run with a stand-in for training that ends with `codes`."""
    folder = f"--folder={machine.folder}/shared"
    flags = ("--", "--workdir=runs/x", f"--codes={codes}")
    return machine.run("bash", "launch/tpu_pod.sh", "run", *RUN, folder, *options, *flags)


def slurm(machine, *flags: str):
    """sbatch with an id whose port for JAX is free."""
    port = fake_clusters.free_port(61440 + os.getpid() % 4000, 65535)
    machine.environment |= {"SLURM_JOB_ID": str(port - 61440)}
    return machine.run("sbatch", "--nodes=2", "launch/slurm.sbatch", *flags)


def test_scripts_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("codes", "word"),
    [
        ("0 0", "finished"),
        ("0 75", "again"),
        ("76 75", "again"),
        ("76 2 75", "2"),
        ("75 143", "again"),
        ("3 76", "3"),
        ("76 1", "crashed"),
        ("137 76", "crashed"),
        ("134 0", "crashed"),
        ("", "crashed"),
    ],
)
def test_verdict_over_all_hosts(codes, word):
    script = f"source {LAUNCH}/exit_codes.sh; printf '%s\\n' {codes} | verdict"
    assert subprocess.check_output(["bash", "-c", script], text=True).strip() == word


def test_pod_survives_preemption(machine):
    """First attempt saved after SIGTERM, slices gone; the second meets its hosts and finishes."""
    (machine.folder / "preempt").touch()
    done = pod(machine, "75,join")
    assert done.returncode == 0, done.stderr
    created = machine.calls("create pod")
    assert len(created) == 2 and len(machine.calls("delete pod --force")) == 1
    assert "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite" in created[0]
    assert "--node-count=2 --node-prefix=pod --spot --zone=here --quiet" in created[0]
    results = machine.folder / "shared" / "runs" / "x"
    assert [(results / f"result-{i}").read_text() for i in range(2)] == ["2 hosts, 11"] * 2
    assert "failure" not in done.stderr


def test_pod_is_created_and_set_up_once(machine):
    done = pod(machine, "0")
    assert done.returncode == 0, done.stderr
    again = pod(machine, "0")
    assert again.returncode == 0, again.stderr
    assert len(machine.calls("create")) == 1 and len(machine.calls("scp")) == 1


@pytest.mark.parametrize(
    ("codes", "code", "starts"), [("2", 2, 1), ("3", 3, 1), ("76,0", 0, 2), ("1", 1, 2)]
)
def test_pod_stops_where_another_attempt_is_of_no_use(machine, codes, code, starts):
    done = pod(machine, codes, "--retries=1")
    assert done.returncode == code, done.stderr
    assert len(machine.calls("ssh pod --node=all --worker=all --command=bash")) == 2 * starts
    assert not machine.calls("delete"), "active slices were given away"


def test_pod_by_single_steps(machine):
    """create, setup, start, status, stop, delete; stop saves on every worker."""
    ready = [machine.folder / f"ready-{index}" for index in range(2)]
    for pipe in ready:
        os.mkfifo(pipe)

    def step(command: str, *flags: str) -> str:
        options = (*RUN, f"--folder={machine.folder}/shared", *flags)
        done = machine.run("bash", "launch/tpu_pod.sh", command, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    step("create")
    step("setup")
    assert sorted(step("status").splitlines()) == ["worker-0 idle", "worker-1 idle"]
    step("start", "--", "--workdir=runs/x", "--codes=wait")
    for pipe in ready:  # until the workers train
        subprocess.run(["cat", pipe], check=True, timeout=60)
    assert sorted(step("status").splitlines()) == ["worker-0 running", "worker-1 running"]
    assert sorted(step("stop").splitlines()) == ["worker-0 exit 75", "worker-1 exit 75"]
    step("delete")
    assert not (machine.folder / "state").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("go",), "go: unknown command"),
        (("run", "--zone=here"), "--name: this option is required"),
        (("run", "--name=Pod", "--zone=here"), "--name: Pod is no name"),
        (("run", *RUN, "--type=h100"), "--type: unknown slice h100"),
        (("run", *RUN), "--bucket: give a bucket"),
        (("run", *RUN, "--bucket=b/runs"), "--bucket: b/runs is no name"),
        (("run", *RUN, "--bucket=b"), "nothing to train"),
        (
            ("run", *RUN, "--bucket=b", "--", "--workdir=gs://b/x"),
            "--workdir: gs://b/x is no folder",
        ),
        (("start", *RUN, "--", "--hosts=auto"), "--hosts: every worker gets --hosts=auto"),
        (("run", "--nmae=x"), "--nmae=x: unknown option"),
    ],
)
def test_mistakes_of_the_pod_command_are_one_line(machine, arguments, line):
    done = machine.run("bash", "launch/tpu_pod.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert not (machine.folder / "calls").exists()


def test_slurm_job_trains_on_after_its_time_limit(machine):
    """launch/train.py itself on two hosts: SIGTERM, saved, requeued, resumed, finished."""
    (machine.folder / "time-limit").write_text("loss=")
    (machine.checkout / "small.py").write_text(SMALL)
    (machine.checkout / "launch" / "train.py").write_text(REAL)
    done = slurm(machine, "--config=small.py", "--workdir=runs/x")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(machine.calls("srun")) == 2 and "again; exit codes: 75 75" in done.stdout
    (logs,) = (machine.checkout / "logs").iterdir()
    saved = re.search(r"Saved at micro-batch (\d+)", (logs / "1.log").read_text())
    resumed = re.search(r"Resumes at micro-batch (\d+)", (logs / "0.log").read_text())
    assert 0 < int(saved.group(1)) == int(resumed.group(1)) < STEPS
    run = machine.checkout / "runs" / "x"
    assert sorted(small_stage.curve(run)) == list(range(1, STEPS + 1))
    assert (run / "final").is_dir()


def test_slurm_job_returns_to_the_queue(machine):
    done = slurm(machine, "--workdir=runs/x", "--codes=76,1,0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(machine.calls("srun")) == 3 and len(machine.calls("scontrol requeue")) == 2
    (logs,) = (machine.checkout / "logs").iterdir()
    assert (logs / "1.log").read_text().split("\n")[:3] == [f"ends with {c}" for c in (76, 1, 0)]


@pytest.mark.parametrize(
    ("code", "state"), [("2", "RUNNING"), ("3", "RUNNING"), ("75", "COMPLETING")]
)
def test_slurm_job_stays_out_of_the_queue(machine, code, state):
    """After a mistake, a diverged loss, and scancel."""
    (machine.folder / "state").write_text(state)
    done = slurm(machine, "--workdir=runs/x", f"--codes={code}")
    assert done.returncode == int(code), done.stdout + done.stderr
    assert not machine.calls("scontrol")


def test_slurm_job_gives_up_after_crashes(machine):
    machine.environment["XLLM_RETRIES"] = "1"
    done = slurm(machine, "--workdir=runs/x", "--codes=1")
    assert done.returncode == 1 and "crashed too often" in done.stderr
    assert len(machine.calls("srun")) == 2


@pytest.mark.parametrize(
    ("flags", "line"),
    [((), "nothing to train"), (("--hosts=auto",), "--hosts: every task gets --hosts=auto")],
)
def test_mistakes_of_the_slurm_script_are_one_line(machine, flags, line):
    done = slurm(machine, *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_hosts_that_do_not_come_are_lost_rather_than_a_mistake(monkeypatch, capsys):
    """After a preemption one host may be back long before another: nothing is to be mended."""
    address = f"127.0.0.1:{fake_clusters.free_port(20000, 30000)}"
    for name, value in (("HOSTS", address), ("COUNT", 2), ("INDEX", 1)):
        monkeypatch.setattr(launch_hosts, name, types.SimpleNamespace(value=value))
    host, port = address.split(":")
    monkeypatch.setattr(hosts, "join", lambda *_: hosts._await_host(host, int(port), 0))
    with pytest.raises(SystemExit) as ended:
        launch_hosts.join()
    assert ended.value.code == hosts.LOST
    assert capsys.readouterr().err.startswith(f"--hosts: host 0 does not answer at {address}")


@pytest.mark.parametrize("slurm", [True, False])
def test_one_sigterm_reaches_the_command_and_its_code_is_kept(tmp_path, slurm):
    """SLURM signals run_with_exit_code.sh alone; a machine that goes down, it and the command."""
    reader, writer = os.pipe()
    saves = f"""
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: print("saving", flush=True))
print("ready", flush=True)
os.read({reader}, 1)
sys.exit(75)
"""
    code = tmp_path / "exit"
    environment = os.environ | ({"SLURM_PROCID": "1"} if slurm else {})
    command = [
        "bash",
        LAUNCH / "run_with_exit_code.sh",
        tmp_path / "exit",
        sys.executable,
        "-c",
        saves,
    ]
    options = {"pass_fds": (reader,), "stdout": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen(command, **options) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        if not slurm:
            os.kill(int(code.with_name("exit.pid").read_text()), signal.SIGTERM)
        assert process.stdout.readline() == "saving\n"
        os.write(writer, b"!")
        assert process.stdout.read() == "", "signalled twice"
        assert process.wait(60) == 75
    assert code.read_text() == "75\n"
