"""Converts published PyTorch and safetensors checkpoints into bases for `init`, and back.

    xllm convert --source=chatglm --input=chatglm-6b --output=bases/llm
    xllm convert --source=eva_vit --input=eva_vit_g.pth --output=bases/vision_encoder
    xllm convert --direction=export --source=blip2 --input=runs/x/final --output=exported
    xllm convert --verify=tests/golden/chatglm

Memory stays small (twice the largest tensor and 1.5 GB at most), nothing half-written is left after
an error, and conversion.json in the output tells what was done. `--verify` replays a recording of
PyTorch code through our networks, prints how far they are apart and exits with 1 when an array is
missed or missing; docs/recording.md tells how to record your own model.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from xllm_jax.convert import run_export, run_import, verify
from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli

SOURCE = flags.DEFINE_string(
    "source", "", "Kind of the checkpoint: the name of a file in xllm_jax/convert/sources."
)
INPUT = flags.DEFINE_string(
    "input", "", "Published file or folder to read; with --direction=export, a base of ours."
)
OUTPUT = flags.DEFINE_string("output", "", "Folder to write; it appears when it is complete.")
SIZE = flags.DEFINE_string(
    "size",
    "",
    "Size of the network, a row of its SIZES; needed where the files do not state it. An export "
    "takes its sizes from the base.",
)
DIRECTION = flags.DEFINE_enum(
    "direction",
    "import",
    ("import", "export"),
    "import reads a published checkpoint; export writes one.",
)
KEEP_PACKED = flags.DEFINE_bool(
    "keep_packed",
    False,
    "Keep the integers of a quantized release of ChatGLM-6B, instead of turning them into floats.",
)
VERIFY = flags.DEFINE_string(
    "verify", "", "Folder of one recording, or of several, to compare our networks with."
)


def main(_: list[str]) -> int:
    """Returns the exit code."""
    if VERIFY.value:
        return replay(Path(VERIFY.value))
    for flag in (SOURCE, INPUT, OUTPUT):
        if not flag.value:
            choices = flags.FLAGS[flag.name].help
            if flag is SOURCE:
                choices = f"Choices: {', '.join(run_import.sources())}"
            raise UserError("this flag is required", field=f"--{flag.name}", hint=choices)
    if DIRECTION.value == "export":
        files = run_export.run_export(SOURCE.value, INPUT.value, OUTPUT.value, SIZE.value)
        print(f"{SOURCE.value}: {', '.join(files)} in {OUTPUT.value}")
        return 0
    run_import.check_output(OUTPUT.value, INPUT.value)
    run_import.check_new(OUTPUT.value)
    done = run_import.run_import(
        SOURCE.value, INPUT.value, OUTPUT.value, SIZE.value, KEEP_PACKED.value
    )
    print(f"{done.line()}; written to {OUTPUT.value}")
    return 0


def replay(recording: Path) -> int:
    """Prints the table of a recording; 1 when anything is missed."""
    rows = verify.replay(recording, progress=lambda line: print(line, file=sys.stderr, flush=True))
    print(verify.table(rows))
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    cli.run(main, "What was at --output before is intact")
