r"""Says before renting whether a stage fits a slice, how fast it can be, and what limits it.

    xllm preflight --config=stage2_image --topology=v5e:4x4 \
        [--config.mesh.fsdp=-1] [--config.slices.data=2] [--output=preflight] [--nosearch]

Compiles the real training step for the slice on any CPU (`pip install -e '.[preflight]'` brings
the TPU compiler); GPUs get arithmetic only. The topology is that of one slice, and the stage's
`slices` says how many there are. Exits with 1 when the stage does not fit.

    xllm preflight --config=stage_output_image --topology=v5e-16 --draw \
        [--steps=50] [--guidance=7.5] [--size=512]

accounts for drawing instead: FLOPs, seconds and memory of a picture, by arithmetic.

    xllm preflight --config=stage2_image --topology=v5e-16 --write=flags.txt
    xllm train --flagfile=flags.txt --workdir=runs/stage2_image

chooses micro-batch, mesh and remat of the same update with the best forecast that fits, within ten
minutes of compiling, and remembers them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli, unused_flags

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
    "records", 200, "Number of records of the data to measure; 0 measures none.", 0
)
SEARCH = flags.DEFINE_bool(
    "search", True, "Also search for the largest micro-batch that fits; takes several compilations."
)
DRAW = flags.DEFINE_bool("draw", False, "Account for a picture instead of a training step.")
STEPS = flags.DEFINE_integer(
    "steps", 50, "With --draw: steps of the scheduler.", 1, 1000, allow_override=True
)
GUIDANCE = flags.DEFINE_float(
    "guidance", 7.5, "With --draw: up to 1 there is one call less.", 0.0, allow_override=True
)
SIZE = flags.DEFINE_string(
    "size",
    "",
    "With --draw: height and width in pixels, such as 512 or 512x768; by default what the decoder "
    "was trained on.",
    allow_override=True,
)
WRITE = flags.DEFINE_string(
    "write",
    "",
    "File of flags for xllm train: the micro-batch, mesh and remat with the best forecast that "
    "fits, for the same update.",
)
AGAIN = flags.DEFINE_bool("again", False, "With --write: choose anew, whatever was chosen before.")
flags.declare_key_flag("allow_paths")


def main(_: list[str]) -> int:
    """Returns the exit code."""
    if DRAW.value:
        names = (WRITE.name, AGAIN.name, SEARCH.name, RECORDS.name)
        unused_flags.refuse("with --draw", "Leave it out, or --draw", *names)
    else:
        unused_flags.refuse("without --draw", "Add --draw", STEPS.name, GUIDANCE.name, SIZE.name)
    if not WRITE.value:
        unused_flags.refuse("without --write", "Add --write=FILE", AGAIN.name)
    prepare_compiler()
    if DRAW.value:
        return draw()
    if WRITE.value:
        return choose()
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


def choose() -> int:
    """Writes the flags of what was chosen for the stage; returns the exit code."""
    from xllm_jax.preflight import apart, chosen, here, targets

    stage = CONFIG.value
    if TOPOLOGY.value == "local":
        found = chosen.find(stage, here.target(stage.slices), AGAIN.value, make=apart.search)
    else:
        found = chosen.find(stage, targets.parse(TOPOLOGY.value), AGAIN.value)
    given = [
        token
        for token in cli.join_values(cli.with_flag_files(sys.argv))[1:]
        if token.lstrip("-").startswith("config")
    ]
    chosen.write(Path(WRITE.value), given, found)
    print(chosen.text(found))
    print("Written:", WRITE.value)
    return 0


def draw() -> int:
    """Accounts for pictures of every modality that the stage answers in; returns the exit code."""
    from xllm_jax.launch.drawing import pixels
    from xllm_jax.preflight import drawing, report, targets

    stage = CONFIG.value
    target = targets.repeated(targets.parse(TOPOLOGY.value), stage.slices)
    options = {"steps": STEPS.value, "guidance": GUIDANCE.value, "size": pixels(SIZE.value) or ()}
    if not stage.outputs:
        hint = "Give a stage such as stage_output_image, or leave --draw out"
        raise UserError("answers of this stage hold text alone", field="--draw", hint=hint)
    found = {name: drawing.forecast(stage, target, name, **options) for name in stage.outputs}
    title = f"{stage.name} on {target.title}, {target.chips} chips"
    lines = [line for one in found.values() for line in ("", *drawing.text(one))]
    page = "\n".join([title, *lines]) + "\n"
    name = f"{stage.name}_{target.title.replace(':', '_').replace(' ', '')}_draw"
    print(page)
    plain = {"stage": stage.name, "topology": target.name}
    plain |= {name: drawing.record(one) for name, one in found.items()}
    files = report.write(OUTPUT.value, name, page, plain)
    print("Written:", ", ".join(map(str, files)))
    return 0 if all(one.fits for one in found.values()) else 1


def prepare_compiler() -> None:
    """Lets the TPU compiler start where the chips that are asked about are not here."""
    if TOPOLOGY.value != "local":
        from xllm_jax.preflight import absent  # takes seconds, which a mistake need not wait for

        absent.prepare()


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    cli.run(main, "An earlier page is whole")
