r"""Says before renting whether a stage fits a slice, how fast it can be, and what limits it.

    xllm preflight --config=stage2_image --topology=v5e:4x4 \
        [--config.mesh.fsdp=-1] [--config.slices.data=2] [--output=preflight] [--nosearch]

Compiles the real training step for the slice on any CPU (`pip install -e '.[preflight]'` brings
the TPU compiler); GPUs get arithmetic only. The topology is that of one slice, and the stage's
`slices` says how many there are. Exits with 1 when the stage does not fit.
"""

from __future__ import annotations

import os

from absl import flags
from ml_collections import config_flags

from xllm_jax.launch import cli

CONFIG = config_flags.DEFINE_config_file("config", None, cli.STAGE_HELP)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Chips to plan for: v5e:4x4, v5p:2x2x1, v4-32, v6e-16, h200:8, or local for this machine.",
)
OUTPUT = flags.DEFINE_string(
    "output", "preflight", "Folder in which the page is written, as text and as JSON."
)
RECORDS = flags.DEFINE_integer(
    "records", 200, "Number of records of the data to measure; 0 measures none."
)
SEARCH = flags.DEFINE_bool(
    "search", True, "Also search for the largest micro-batch that fits; takes several compilations."
)
flags.declare_key_flag("allow_paths")


def main(_: list[str]) -> int:
    """Returns the exit code."""
    prepare_compiler()
    from xllm_jax.preflight import forecast, records, report, targets

    stage, target = CONFIG.value, targets.parse(TOPOLOGY.value)
    made = forecast.make(stage, target)
    largest = forecast.largest(stage, target, made) if SEARCH.value and target.chip.memory else None
    look = records.scan(stage.data, RECORDS.value) if RECORDS.value else None
    page = report.text(made, largest, look)
    name = f"{stage.name}_{made.target.title.replace(':', '_').replace(' ', '')}"
    print(page)
    files = report.write(OUTPUT.value, name, page, report.record(made, largest, look))
    print("Written:", ", ".join(map(str, files)))
    return 0 if made.fits else 1


def prepare_compiler() -> None:
    """Lets the TPU compiler start where there is no TPU, and beside another of its kind."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if TOPOLOGY.value != "local":
        import jax  # takes seconds, which a mistake need not wait for

        jax.config.update("jax_platforms", "cpu")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main, "An earlier page is whole")
