"""The flag --base of commands that ask a finished run."""

from __future__ import annotations

from absl import flags

BASE = flags.DEFINE_string(
    "base",
    "",
    "Folder of the LLM's base, in place of the one that the run names: the same elsewhere, or a "
    "packing of it by xllm quantize.",
    allow_override=True,
)
