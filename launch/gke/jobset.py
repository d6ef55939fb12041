"""Manifests of a JobSet that trains on GKE, as trees of plain Python values.

A JobSet (jobset.x-k8s.io/v1alpha2) is a group of Jobs that restart together: one Job a TPU slice,
or one Job for all GPU nodes; one pod a host.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.preflight import targets

ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "a100": "nvidia-a100-80gb",
    "h100": "nvidia-h100-80gb",
    "h200": "nvidia-h200-141gb",
}
HOPELESS = (2, 3, 74)  # a user's mistake, a diverged loss, a disk that cannot be written to
CONTINUES = (75, 76, 143)  # saved after SIGTERM, a host stalled or was lost, SIGTERM while starting
PORT = 8476  # of the coordination service on GPUs
SHARED = "/shared"  # where the bucket or claim is mounted; the image links bases, data, runs to it


@dataclasses.dataclass(frozen=True)
class Run:
    """What to run where.

    Attributes:
      name: of the JobSet.
      target: chips; of one slice for TPUs, of all nodes for GPUs.
      image: container image.
      arguments: flags of launch/train.py.
      slices: TPU slices.
      chips_per_host: 0 for what is usual.
      bucket, claim: where bases, data and runs lie: a bucket or a PersistentVolumeClaim.
      account: Kubernetes service account that may use the bucket.
      spot: whether nodes may be taken away.
      restarts: how often the whole set starts again after a crash.
      grace: seconds between SIGTERM and SIGKILL.
    """

    name: str
    target: targets.Target
    image: str
    arguments: tuple[str, ...]
    slices: int = 1
    chips_per_host: int = 0
    bucket: str = ""
    claim: str = ""
    account: str = ""
    spot: bool = False
    restarts: int = 5
    grace: int = 120

    @property
    def tpu(self) -> bool:
        """Whether it runs on TPUs."""
        return self.target.chip.axes > 0

    @property
    def chips(self) -> int:
        """Chips of one host."""
        return self.chips_per_host or min(self.target.chips, 4 if self.tpu else 8)

    @property
    def hosts(self) -> int:
        """Hosts of one Job.

        Raises:
          UserError: the chips do not fill whole hosts.
        """
        if self.target.chips % self.chips:
            raise UserError(
                f"{self.target.chips} chips do not fill hosts of {self.chips}",
                field="--topology",
                hint="Choose whole hosts, or give --chips_per_host",
            )
        return self.target.chips // self.chips


def arguments(text: str) -> tuple[str, ...]:
    """Splits the flags of launch/train.py.

    Raises:
      UserError: an unclosed quote, a path of a bucket, or a flag that the manifest sets itself.
    """
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise UserError(str(error), field="--train", hint="Quote it as for a shell") from error
    for flag in found:
        name, _, value = flag.partition("=")
        if value.startswith("gs://"):
            raise UserError(
                f"{value} is no folder", field=name, hint="Write runs/…, data/… or bases/…"
            )
        if name.startswith("--host"):
            raise UserError("the manifest sets it", field=name, hint="Leave it out of --train")
    return tuple(found)


def check(run: Run) -> None:
    """Raises `UserError` for what a cluster would refuse, or would do wrongly."""
    # Pods are called NAME-train-SLICE-HOST-xxxxx, and a host name has 63 letters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", run.name):
        raise UserError(
            f"{run.name!r} is no name",
            field="--name",
            hint="Use at most 40 small letters, digits and -, a letter first",
        )
    if run.target.kind not in ACCELERATORS:
        raise UserError("GKE has no such nodes", field="--topology", hint="As in v5e:4x4, h100:8")
    if bool(run.bucket) == bool(run.claim):
        raise UserError(
            "give one of --bucket and --claim",
            field="--bucket",
            hint="Checkpoints must outlive the pods",
        )
    for field, value in (("bucket", run.bucket), ("claim", run.claim), ("account", run.account)):
        if value and not re.fullmatch(r"[a-z0-9][-a-z0-9_.]*", value):
            field = "--service_account" if field == "account" else f"--{field}"
            raise UserError(f"{value!r} is no name", field=field, hint="As the cluster knows it")
    if run.hosts == 1 < run.slices or (run.slices > 1 and not run.tpu):
        raise UserError(
            "several slices are for TPU slices of several hosts",
            field="--slices",
            hint="For GPUs name all of them in --topology",
        )


def manifest(run: Run) -> dict[str, Any]:
    """The JobSet of a run."""
    metadata: dict[str, Any] = {"name": run.name}
    if run.tpu:
        # One slice is one node pool: no two Jobs share one, no Job spreads over two.
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {key: "cloud.google.com/gke-nodepool"}
    rule = {
        "name": "hopeless",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": run.restarts,
                "restartStrategy": "BlockingRecreate",
                "rules": [rule],
            },
            "replicatedJobs": [
                {
                    "name": "train",
                    "replicas": run.slices if run.tpu else 1,
                    "template": {"spec": job(run)},
                }
            ],
        },
    }


def job(run: Run) -> dict[str, Any]:
    """The Job of one slice, or of all GPU nodes.

    A pod that ends with 75, 76 or 143, or whose node was taken away, is replaced and joins the
    others again without counting. 2, 3 and 74 fail the Job for the reason PodFailurePolicy, which
    ends the JobSet. Anything else fails it for another reason, and the JobSet starts anew.
    """
    return {
        "completionMode": "Indexed",
        "completions": run.hosts,
        "parallelism": run.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                _exit_codes("FailJob", HOPELESS),
                _exit_codes("Ignore", CONTINUES),
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": pod(run),
    }


def _exit_codes(action: str, codes: Sequence[int]) -> dict[str, Any]:
    requirement = {"containerName": "train", "operator": "In", "values": list(codes)}
    return {"action": action, "onExitCodes": requirement}


def pod(run: Run) -> dict[str, Any]:
    """The pod of one host."""
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": run.grace,
        "nodeSelector": _nodes(run),
        "containers": [_container(run)],
        "volumes": [
            _shared(run),
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    if run.account:
        spec["serviceAccountName"] = run.account
    if run.spot:
        key = "cloud.google.com/gke-spot"
        spec["tolerations"] = [
            {"key": key, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    metadata = {"annotations": {"gke-gcsfuse/volumes": "true"}} if run.bucket else {}
    return {"metadata": metadata, "spec": spec}


def _nodes(run: Run) -> dict[str, str]:
    """Labels of the nodes that a pod may run on."""
    accelerator = ACCELERATORS[run.target.kind]
    if run.tpu:
        labels = {
            "cloud.google.com/gke-tpu-accelerator": accelerator,
            "cloud.google.com/gke-tpu-topology": "x".join(map(str, run.target.shape)),
        }
    else:
        labels = {"cloud.google.com/gke-accelerator": accelerator}
    return labels | ({"cloud.google.com/gke-spot": "true"} if run.spot else {})


def _container(run: Run) -> dict[str, Any]:
    resource = "google.com/tpu" if run.tpu else "nvidia.com/gpu"
    return {
        "name": "train",
        "image": run.image,
        "command": ["python", "launch/train.py"],
        # Kubernetes makes one $ of two, and puts variables of the container in place of $(NAME).
        "args": [*_hosts(run), *(flag.replace("$", "$$") for flag in run.arguments)],
        "resources": {"limits": {resource: run.chips}},
        "volumeMounts": [
            {"name": "shared", "mountPath": SHARED},
            {"name": "memory", "mountPath": "/dev/shm"},  # the decoders' processes, NCCL
        ],
    }


def _hosts(run: Run) -> list[str]:
    """How the hosts find each other: GKE tells TPU pods; GPU pods go by JobSet's host names."""
    if run.hosts * (run.slices if run.tpu else 1) == 1:
        return []
    if run.tpu:
        return ["--hosts=auto"]
    first = f"{run.name}-train-0-0.{run.name}"
    return [
        f"--hosts={first}:{PORT}",
        f"--host_count={run.hosts}",
        "--host_index=$(JOB_COMPLETION_INDEX)",
    ]


def _shared(run: Run) -> dict[str, Any]:
    if run.claim:
        return {"name": "shared", "persistentVolumeClaim": {"claimName": run.claim}}
    attributes = {"bucketName": run.bucket, "mountOptions": "implicit-dirs"}
    csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}
    return {"name": "shared", "csi": csi}
