"""Replays a recording of PyTorch code and prints how far our networks are from it.

    python launch/verify.py --recording=tests/golden/chatglm

`docs/recording.md` tells how to make a recording of your own model. Exits with 1 when an array is
missed or missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags

from launch import command
from xllm_jax.convert import verify

RECORDING = flags.DEFINE_string("recording", None, "Folder of one recording, or of several.")


def main(_: list[str]) -> int:
    """Returns the exit code."""
    rows = verify.replay(
        Path(RECORDING.value), progress=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(verify.table(rows))
    return int(any(row.missed for row in rows))


if __name__ == "__main__":
    flags.mark_flag_as_required("recording")
    command.run(main)
