"""CPU seconds from the command to the first step, by stage and phase.

PYTHONPATH=. JAX_PLATFORMS=cpu python benchmarks/startup.py [--stages=stage2_image,...] \
    [--size=tiny|real]

Every stage has a process of its own, without a cache of compiled programs. Data and parameters are
not read: shapes are enough for all of it. At the real size nothing is compiled, and the mesh is one
chip's without devices.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import time

STAGES = (
    "stage1_speech", "stage1_image", "stage2_image", "stage2_video", "stage2_speech",
    "stage3_instruction", "stage_output_image", "stage_output_denoising",
)  # fmt: skip
PHASES = ("Python and imports", "state's shapes", "trace", "FLOPs", "lowering", "compiling")


def phases(name: str, size: str) -> list[float]:
    """CPU seconds of each phase, in this process."""
    import xllm_jax.launch.train  # noqa: F401  what the command imports before it looks at flags
    from xllm_jax.training import loop  # noqa: F401  and afterwards

    marks = [time.process_time()]
    from xllm_jax.preflight import forecast, targets

    begun = time.process_time()
    stage = importlib.import_module(f"xllm_jax.configs.{name}").get_config(size)
    for out in stage.outputs.values():  # else it stands beside the decoder, and no base is read
        out.schedule = out.schedule or "stable_diffusion_1_5"
    where = targets.parse("local" if size == "tiny" else "h200:1")
    lowered = forecast.prepare(stage, where, compiles=size == "tiny")
    ends = [begun, time.process_time()]
    _ = lowered.traced
    ends.append(time.process_time())
    forecast.counts(lowered)
    ends.append(time.process_time())
    if size == "tiny":
        program = lowered.traced.lower()
        ends.append(time.process_time())
        program.compile()
        ends.append(time.process_time())
    return marks + [after - before for before, after in itertools.pairwise(ends)]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--size", default="tiny", choices=("tiny", "real"))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(phases(given.one, given.size)))
        return
    print("| stage | " + " | ".join(PHASES) + " |")
    print("| --- |" + " --- |" * len(PHASES))
    kept = {name: value for name, value in os.environ.items() if "COMPILATION_CACHE" not in name}
    for name in given.stages.split(","):
        command = [sys.executable, __file__, f"--one={name}", f"--size={given.size}"]
        done = subprocess.run(command, capture_output=True, text=True, env=kept)
        if done.returncode:
            sys.exit(done.stderr)
        cells = [
            f"{seconds:.2f}" for seconds in json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
        ]
        row = " | ".join(cells + [""] * (len(PHASES) - len(cells)))
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
