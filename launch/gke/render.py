r"""Writes the manifest of a training run on GKE.

    python launch/gke/render.py --topology=v5e:4x4 [--slices=2] --image=IMAGE --bucket=BUCKET \
        --train='--config=configs/stage2_image.py --workdir=runs/stage2_image' | kubectl apply -f -

GPUs are --topology=h100:16 (two nodes of eight). The cluster needs JobSet 0.8 or newer; the image
is launch/gke/Dockerfile; the bucket or claim holds bases/, data/ and runs/. See docs/scale.md.
"""

from __future__ import annotations

import sys

import yaml
from absl import flags

from xllm_jax.launch import cli
from xllm_jax.launch.gke import jobset
from xllm_jax.preflight import targets

NAME = flags.DEFINE_string("name", "xllm", "Name of the JobSet, of at most 40 characters.")
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Chips to run on: a slice such as v5e:4x4 or v5p-32, or all GPUs such as h100:16.",
)
IMAGE = flags.DEFINE_string("image", None, "Container image, built from launch/gke/Dockerfile.")
TRAIN = flags.DEFINE_string("train", None, "Flags of xllm train, quoted as for a shell.")
SLICES = flags.DEFINE_integer("slices", 1, "Number of TPU slices; each is a node pool.", 1)
CHIPS = flags.DEFINE_integer(
    "chips_per_host", 0, "Number of chips of a node; 0 takes 4 TPUs or 8 GPUs.", 0
)
BUCKET = flags.DEFINE_string("bucket", "", "Bucket with bases/, data/ and runs/ at its top.")
CLAIM = flags.DEFINE_string(
    "claim", "", "PersistentVolumeClaim with these folders, instead of a bucket."
)
ACCOUNT = flags.DEFINE_string(
    "service_account", "", "Kubernetes service account that may use the bucket."
)
SPOT = flags.DEFINE_bool("spot", False, "Run on spot nodes, which may be taken away.")
RESTARTS = flags.DEFINE_integer("restarts", 5, "Number of restarts after crashes.", 0)
GRACE = flags.DEFINE_integer(
    "grace", 120, "Time between SIGTERM and SIGKILL in which a run saves, in seconds.", 1
)


def main(_: list[str]) -> None:
    run = jobset.Run(
        name=NAME.value,
        target=targets.parse(TOPOLOGY.value),
        image=IMAGE.value,
        arguments=jobset.arguments(TRAIN.value),
        slices=SLICES.value,
        chips_per_host=CHIPS.value,
        bucket=BUCKET.value.removeprefix("gs://"),
        claim=CLAIM.value,
        account=ACCOUNT.value,
        spot=SPOT.value,
        restarts=RESTARTS.value,
        grace=GRACE.value,
    )
    jobset.check(run)
    yaml.safe_dump(jobset.manifest(run), sys.stdout, sort_keys=False)


if __name__ == "__main__":
    flags.mark_flags_as_required(["topology", "image", "train"])
    cli.run(main)
