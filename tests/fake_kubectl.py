"""Stands for `kubectl apply -f -` and the cluster behind it: pods are processes of this machine.

Does with a JobSet what the controllers of Kubernetes and JobSet do: indexed pods, the Job's failure
policy and backoff limit, the JobSet's failure policy. The name of the first pod leads to
$FAKE_ADDRESS. Prints how the JobSet ended; `calls` in $FAKE_CLUSTER has a line for every pod that
ended.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(os.environ["FAKE_CLUSTER"])
ADDRESS = os.environ.get("FAKE_ADDRESS", "")  # where the first pod's port can be reached


def run_jobset(manifest: dict[str, Any]) -> str:
    policy = manifest["spec"]["failurePolicy"]
    restarts = 0
    while True:
        reason = run_job(manifest)
        if not reason:
            return "Completed"
        for rule in policy["rules"]:
            if reason in rule["onJobFailureReasons"] and rule["action"] == "FailJobSet":
                return f"Failed: {reason}"
        restarts += 1
        if restarts > policy["maxRestarts"]:
            return "Failed: ReachedMaxRestarts"


def run_job(manifest: dict[str, Any]) -> str:
    """Returns '' or the reason for which the Job failed."""
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    name = f"{manifest['metadata']['name']}-train-0"
    waiting, failures = set(range(spec["completions"])), 0
    while waiting:
        pods = {index: start(spec["template"], name, index) for index in waiting}
        for index, pod in pods.items():
            code = pod.wait()
            with (FOLDER / "calls").open("a") as calls:
                calls.write(f"pod {index} exit {code}\n")
            if code == 0:
                waiting.discard(index)
                continue
            action = verdict(spec["podFailurePolicy"], code)
            failures += action == "Count"
            if action == "FailJob" or failures > spec["backoffLimit"]:
                for other in pods.values():
                    other.kill()
                return "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    return ""


def verdict(policy: dict[str, Any], code: int) -> str:
    """What the first rule that fits says about an exit code."""
    for rule in policy["rules"]:
        codes = rule.get("onExitCodes")
        if codes and codes["operator"] == "In" and code in codes["values"]:
            return rule["action"]
    return "Count"


def start(template: dict[str, Any], job: str, index: int) -> subprocess.Popen:
    assert template["spec"]["restartPolicy"] == "Never"
    container = template["spec"]["containers"][0]
    environment = {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    if "google.com/tpu" in container["resources"]["limits"]:
        environment |= {
            "TPU_WORKER_ID": str(index),
            "TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.1",
            "JAX_FORCE_TPU_INIT": "1",  # how JAX learns that this is a TPU VM
        }
    words = []
    for word in [*container["command"], *container.get("args", [])]:
        word = re.sub(r"\$\((\w+)\)", lambda found: environment[found.group(1)], word)
        words.append(word.replace(f"{job}-0.{job.removesuffix('-train-0')}:8476", ADDRESS))
    return subprocess.Popen(words, env=os.environ | environment)


if __name__ == "__main__":
    assert sys.argv[1:] == ["apply", "-f", "-"], sys.argv
    ended = run_jobset(yaml.safe_load(sys.stdin))
    print(ended)
    sys.exit(0 if ended == "Completed" else 1)
