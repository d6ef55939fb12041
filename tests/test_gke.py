"""GKE manifests: the schemas of Kubernetes and JobSet, and what pods that end bring about."""

from __future__ import annotations

import sys

import fake_clusters
import jsonschema
import kubernetes_validate
import pytest
import yaml

from xllm_jax.core.errors import UserError
from xllm_jax.launch.gke import jobset
from xllm_jax.preflight import targets

# The oldest Kubernetes whose pod failure policy is stable, and a newer one.
VERSIONS = ("1.31", "1.34")
RULE = {
    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    "onJobFailureReasons": {
        "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]},
        "uniqueItems": True,
    },
    "targetReplicatedJobs": {"type": "array", "items": {"type": "string"}},
}


def closed(properties: dict, *required: str) -> dict:
    """Schema of an object that has no other fields."""
    made = {"type": "object", "properties": properties, "required": list(required)}
    return made | {"additionalProperties": False}


# The outer layer as api/jobset/v1alpha2/jobset_types.go of kubernetes-sigs/jobset has it; the Jobs
# inside are checked against Kubernetes' own schema.
JOBSET = closed(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": closed(
            {
                "network": closed(
                    {
                        "enableDNSHostnames": {"type": "boolean"},
                        "subdomain": {"type": "string"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                    }
                ),
                "failurePolicy": closed(
                    {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "restartStrategy": {
                            "enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]
                        },
                        "rules": {"type": "array", "items": closed(RULE, "name", "action")},
                    }
                ),
                "replicatedJobs": {
                    "type": "array",
                    "items": closed(
                        {
                            "name": {"type": "string"},
                            "groupName": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": closed({"metadata": {}, "spec": {}}, "spec"),
                        },
                        "name",
                        "template",
                    ),
                },
            },
            "replicatedJobs",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)


def made(topology: str, **fields) -> dict:
    """The manifest for a slice, as kubectl reads it."""
    fields = {"bucket": "b", "arguments": ("--workdir=runs/x",)} | fields
    run = jobset.Run("name", targets.parse(topology), "image", **fields)
    return yaml.safe_load(yaml.safe_dump(jobset.manifest(run)))


def job_of(manifest: dict) -> dict:
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize(
    ("topology", "fields"),
    [
        ("v5e:4x4", {"slices": 2, "spot": True, "account": "trainer"}),
        ("v5p-8", {"bucket": "", "claim": "shared"}),
        ("h100:16", {"spot": True}),
        ("a100:4", {}),
    ],
)
def test_manifests_fit_the_schemas(topology, fields):
    manifest = made(topology, **fields)
    jsonschema.validate(manifest, JOBSET)
    metadata = {"name": "name"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job_of(manifest)}
    for version in VERSIONS:
        kubernetes_validate.validate(job, version, strict=True)


@pytest.mark.parametrize(
    ("topology", "fields", "hosts", "labels", "resources", "joins"),
    [
        (
            "v5e-16",
            {"slices": 2},
            4,
            {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "4x4"},
            {"google.com/tpu": 4},
            ["--hosts=auto"],
        ),
        (
            "v5e:2x4",
            {"chips_per_host": 8},
            1,
            {"gke-tpu-accelerator": "tpu-v5-lite-podslice", "gke-tpu-topology": "2x4"},
            {"google.com/tpu": 8},
            [],
        ),
        (
            "v4-32",
            {"spot": True},
            4,
            {
                "gke-tpu-accelerator": "tpu-v4-podslice",
                "gke-tpu-topology": "2x2x4",
                "gke-spot": "true",
            },
            {"google.com/tpu": 4},
            ["--hosts=auto"],
        ),
        (
            "h200:16",
            {},
            2,
            {"gke-accelerator": "nvidia-h200-141gb"},
            {"nvidia.com/gpu": 8},
            [
                "--hosts=name-train-0-0.name:8476",
                "--host_count=2",
                "--host_index=$(JOB_COMPLETION_INDEX)",
            ],
        ),
    ],
)
def test_hosts_chips_and_nodes(topology, fields, hosts, labels, resources, joins):
    manifest = made(topology, **fields)
    job = job_of(manifest)
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert manifest["spec"]["replicatedJobs"][0]["replicas"] == fields.get("slices", 1)
    assert (job["completions"], job["parallelism"]) == (hosts, hosts)
    assert pod["nodeSelector"] == {f"cloud.google.com/{key}": labels[key] for key in labels}
    assert container["resources"]["limits"] == resources
    assert container["args"] == [*joins, "--workdir=runs/x"]


@pytest.fixture
def machine(tmp_path):
    return fake_clusters.make(tmp_path)


def apply(machine, manifest: str) -> tuple[str, list[str]]:
    """kubectl apply: (how the JobSet ended, how every pod did)."""
    done = machine.run("kubectl", "apply", "-f", "-", input=manifest)
    return done.stdout.splitlines()[-1], machine.calls("pod")


def test_pods_that_saved_come_back_and_finish(machine):
    """Every pod ends with 75, is replaced, meets the other at the first pod's name and finishes."""
    render = (sys.executable, str(fake_clusters.ROOT / "launch" / "gke" / "render.py"))
    train = "--train=--workdir=runs/x --codes=75,join"
    made = machine.run(*render, "--topology=h100:16", "--image=i", "--bucket=gs://b", train)
    assert made.returncode == 0, made.stderr
    ended, pods = apply(machine, made.stdout)
    assert ended == "Completed", ended
    assert pods == ["pod 0 exit 75", "pod 1 exit 75", "pod 0 exit 0", "pod 1 exit 0"]
    results = machine.checkout / "runs" / "x"
    assert [(results / f"result-{i}").read_text() for i in range(2)] == ["2 hosts, 11"] * 2


@pytest.mark.parametrize(
    ("codes", "ended", "pods"),
    [
        ("2", "Failed: PodFailurePolicy", 1),
        ("76,3", "Failed: PodFailurePolicy", 3),
        ("1", "Failed: ReachedMaxRestarts", 6),
    ],
)
def test_pods_that_fail_end_the_set_or_start_it_again(machine, codes, ended, pods):
    arguments = ("--workdir=runs/x", f"--codes={codes}")
    told, ends = apply(machine, yaml.safe_dump(made("h100:16", arguments=arguments)))
    assert told == ended and len(ends) == pods


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("--workdir=gs://b/x", "--workdir: gs://b/x is no folder"),
        ("--hosts=auto", "--hosts: the manifest sets it"),
        ("--a='b", "--train: No closing quotation"),
    ],
)
def test_flags_of_training_that_cannot_work_are_refused(text, line):
    with pytest.raises(UserError) as caught:
        jobset.arguments(text)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("topology", "fields", "line"),
    [
        ("h100:16", {"bucket": ""}, "--bucket: give one of --bucket and --claim"),
        ("h100:16", {"claim": "c"}, "--bucket: give one of --bucket and --claim"),
        ("h100:16", {"slices": 2}, "--slices: several slices"),
        ("v5e:2x2", {"slices": 2}, "--slices: several slices"),
        ("h100:16", {"name": "X"}, "--name: 'X' is no name"),
        ("local", {}, "--topology: GKE has no such"),
        ("h100:12", {}, "--topology: 12 chips do not fill hosts of 8"),
    ],
)
def test_runs_that_no_cluster_can_do_are_refused(topology, fields, line):
    fields = {"name": "x", "bucket": "b", "image": "i", "arguments": ()} | fields
    with pytest.raises(UserError) as caught:
        jobset.check(jobset.Run(target=targets.parse(topology), **fields))
    assert str(caught.value).startswith(line)
