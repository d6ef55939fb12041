"""Packs the kernels of a base's layers into 8 or 4 bits; they stay packed while they are used.

    xllm quantize --input=bases/llm --output=bases/llm_nf4 --weights=nf4
    xllm train --config=… --config.init.llm=bases/llm_nf4 --config.parts.llm.weights=nf4

One layer is in memory at a time. Word tables, heads, norms and biases stay as they are. The INT8
and INT4 releases of ChatGLM-6B need no such step: xllm convert --source=chatglm --keep_packed.
"""

from __future__ import annotations

from absl import flags

from xllm_jax.convert import quantize
from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli
from xllm_jax.models.quantized import KINDS

INPUT = flags.DEFINE_string("input", "", "Base of floats.")
OUTPUT = flags.DEFINE_string("output", "", "Folder to write; it appears when it is complete.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "nf4", tuple(KINDS), "int8 has a scale an output, int4 and nf4 one for 64 inputs."
)
PART = flags.DEFINE_string("part", "llm", "Part of the base whose layers are packed.")
SOURCE = flags.DEFINE_string(
    "source", "", "What the base was converted from, where it does not tell."
)


def main(_: list[str]) -> int:
    """Returns the exit code."""
    for flag in (INPUT, OUTPUT):
        if not flag.value:
            raise UserError(
                "this flag is required", field=f"--{flag.name}", hint=flags.FLAGS[flag.name].help
            )
    before, after = quantize.run(INPUT.value, OUTPUT.value, WEIGHTS.value, PART.value, SOURCE.value)
    print(f"{before / 1e6:,.1f} MB became {after / 1e6:,.1f} MB; written to {OUTPUT.value}")
    return 0


if __name__ == "__main__":
    cli.run(main, "What was at --output before is intact")
