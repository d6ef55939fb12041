r"""Trains one stage.

    xllm train --config=stage2_image[:tiny] --workdir=DIR \
        [--config.optimizer.peak=1e-4] [--config.data.mix.captions=0]

With --config.data.rows=auto the devices that are here decide on micro-batch, mesh and remat, for
the same update (docs/preflight.md).

In a checkout, python launch/train.py --config=configs/stage2_image.py is the same. The same command
continues a run that was stopped. On several hosts it runs on each of them, with --hosts=auto or
--hosts=ADDRESS:PORT --host_count=N --host_index=I (launch/hosts.py). Exit codes: launch/cli.py.
"""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import config_flags

from xllm_jax.core.errors import UserError
from xllm_jax.launch import auto_rows, cli, hosts

CONFIG = config_flags.DEFINE_config_file("config", None, cli.STAGE_HELP)
flags.adopt_module_key_flags(hosts)
flags.adopt_module_key_flags(auto_rows)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, for its checkpoints, logs and result."
)
flags.declare_key_flag("allow_paths")
flags.declare_key_flag("flagfile")  # of xllm preflight --write


def main(_: list[str]) -> None:
    if not WORKDIR.value:
        raise UserError("names no folder", field="--workdir")
    hosts.join()
    from xllm_jax.core import watchdog  # takes seconds, which a mistake need not wait for
    from xllm_jax.training import loop

    stage = auto_rows.settle(CONFIG.value, WORKDIR.value)
    try:
        result = loop.fit(stage, WORKDIR.value)
    except watchdog.Preempted as stop:
        print(f"Saved at micro-batch {stop.step}; the same command continues", file=sys.stderr)
        raise
    print(f"Trained parts: {result}")


def kept() -> str:
    """What is intact when the run ends early."""
    from xllm_jax.core import kept_checkpoints

    return kept_checkpoints.sentence(WORKDIR.value)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    cli.run(main, kept)
