r"""Shows a stage's training data as the model will see it, before a run is paid for.

    xllm inspect --config=stage2_image[:tiny] [--samples=24] \
        [--output=DIR] [--config.data.root=/data]

Prints counts, lengths, the share of supervised tokens and the padding waste, and writes audit.html
with samples: pictures, frames, spectrograms with sound, prompts with their slots, supervised tokens
highlighted. Ends with exit code 2 when a source has nothing to learn.
"""

from __future__ import annotations

from absl import flags
from ml_collections import config_flags

from xllm_jax.launch import cli

CONFIG = config_flags.DEFINE_config_file("config", None, cli.STAGE_HELP)
SAMPLES = flags.DEFINE_integer("samples", 24, "Number of samples on the page.", 1, 100_000)
OUTPUT = flags.DEFINE_string("output", ".", "Folder in which audit.html is written.")
flags.declare_key_flag("allow_paths")


def main(_: list[str]) -> None:
    from xllm_jax.audit import audit, page  # takes seconds, which a mistake need not wait for

    found = audit(CONFIG.value, SAMPLES.value)
    print(page.terminal(found))
    print(f"\nWith samples: {page.write(found, OUTPUT.value)}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    cli.run(main, "The data are as they were")
