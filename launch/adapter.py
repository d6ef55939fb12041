"""Takes LoRA and DoRA adapters from PEFT, gives them to PEFT, and merges them into a base.

    xllm adapter --action=import --input=peft_folder --base=bases/llm --output=bases/adapter
    xllm adapter --action=export --input=runs/lora --output=peft_folder
    xllm adapter --action=merge --input=runs/lora --output=bases/merged

A stage takes an imported adapter by --config.lora.init; PEFT reads an exported folder over the
published model. Nothing half-written is left after an error.
"""

from __future__ import annotations

from absl import flags

from xllm_jax.convert import adapters, adapters_out
from xllm_jax.core.errors import UserError
from xllm_jax.launch import cli, unused_flags

ACTION = flags.DEFINE_enum("action", "", ("", "import", "export", "merge"), "What to do.")
INPUT = flags.DEFINE_string(
    "input",
    "",
    "PEFT's folder, or a file of weights with adapters in it; else a run or an adapter.",
)
OUTPUT = flags.DEFINE_string("output", "", "Folder to write; it appears when it is complete.")
BASE = flags.DEFINE_string(
    "base",
    "",
    "Base that the adapters belong to; a run says by itself where its base lies.",
    allow_override=True,
)
SOURCE = flags.DEFINE_string(
    "source", "", "What the base was converted from, where it does not tell."
)
PART = flags.DEFINE_string("part", "llm", "Part of the base that the adapters belong to.")
ALPHA = flags.DEFINE_float(
    "alpha",
    0.0,
    "With --action=import: lora_alpha of weights without adapter_config.json; NExT-GPT's is 32.",
)
NAME = flags.DEFINE_string(
    "name", "", "With --action=export: what the configuration calls the base."
)


def main(_: list[str]) -> int:
    """Returns the exit code."""
    for flag in (ACTION, INPUT, OUTPUT):
        if not flag.value:
            raise UserError(
                "this flag is required", field=f"--{flag.name}", hint=flags.FLAGS[flag.name].help
            )
    for flag, action in ((ALPHA, "import"), (NAME, "export")):
        if ACTION.value != action:
            unused_flags.refuse(f"with --action={ACTION.value}", "Leave it out", flag.name)
    given, rest = (INPUT.value, OUTPUT.value), (SOURCE.value, PART.value)
    if ACTION.value == "import":
        if not BASE.value:
            raise UserError("this flag is required", field="--base", hint=flags.FLAGS["base"].help)
        told = adapters.import_adapter(INPUT.value, BASE.value, OUTPUT.value, ALPHA.value, *rest)
    elif ACTION.value == "export":
        told = adapters_out.export_adapter(*given, BASE.value, *rest, NAME.value)
    else:
        told = adapters_out.merge(*given, BASE.value, *rest)
    print(f"{told}; written to {OUTPUT.value}")
    return 0


if __name__ == "__main__":
    cli.run(main, "What was at --output before is intact")
