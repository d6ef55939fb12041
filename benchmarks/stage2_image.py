"""Stage 2, image: a training step on one accelerator, ours against the same arithmetic in PyTorch.

PYTHONPATH=. python benchmarks/stage2_image.py [--size=real] [--rows=64] [--steps=20] [--rounds=3]
    [--attention=cudnn] [--llm_attention=xla] [--remat] [--unroll=1] [--sides=jax,torch]
    [--torch_mode=default] [--precision=bfloat16] [--output=FILE.json]

ViT-g frozen and without gradients, Q-Former and adapter trained, ChatGLM-6B frozen with gradients
through it, loss on the answer, AdamW; bfloat16, random weights, no data reading. The other side is
`stage2_image_torch.py`. Each side has a process of its own, one after the other. MFU counts useful
FLOPs (`core/flops.py`), the same number for both, against the chip's bfloat16 peak.

`--size=tiny` runs both sides in float32 on any CPU, on the same weights, and fails unless their
losses agree over all steps: so the arithmetic, gradients and updates included, is the same. Where
torch.compile has no compiler to work with, add --torch_mode=none.

XLA_FLAGS reaches our side. Worth a try on a GPU, one at a time, where the installed XLA knows them:
--xla_gpu_enable_dynamic_slice_fusion=true (no copy of a layer's weights out of the stack),
--xla_gpu_triton_gemm_any=true, and --unroll=28 instead of the scan over layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from xllm_jax.core import chips
from xllm_jax.training.trainer import Trainer

RATE, BETAS, EPSILON = 1e-3, (0.9, 0.98), 1e-8
# Largest relative difference of the two sides' losses. The updates of the run change the loss by
# some 1e-4, so that in float32 wrong gradients are seen.
AGREE = {"float32": 2e-6, "bfloat16": 5e-3}
SPREAD = 0.1  # of the tiny size's weights
GIB = 2**30


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=("real", "tiny"), default="real")
    parser.add_argument("--precision", choices=tuple(AGREE), default=None, help="tiny: float32")
    parser.add_argument("--rows", type=int, default=0, help="rows of a micro-batch; 64, tiny 2")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--attention", choices=("cudnn", "xla"), default=None, help="of the ViT")
    parser.add_argument("--llm_attention", choices=("cudnn", "xla"), default="xla")
    parser.add_argument("--remat", action="store_true", help="recompute layers when going back")
    parser.add_argument("--unroll", type=int, default=1)
    parser.add_argument("--sides", default="jax,torch")
    parser.add_argument("--torch_mode", default="default", help="of torch.compile; none = eager")
    parser.add_argument("--output", default="")
    parser.add_argument("--side", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    found = parser.parse_args(argv)
    tiny = found.size == "tiny"
    found.rows = found.rows or (2 if tiny else 64)
    found.precision = found.precision or ("float32" if tiny else "bfloat16")
    return found


def stage_of(choice: argparse.Namespace, gpu: bool) -> Any:
    """The stage as configured, fresh parameters, one update per micro-batch, constant rate."""
    from xllm_jax.configs import stage2_image
    from xllm_jax.core.stage import Optimizer

    stage = stage2_image.get_config(choice.size)
    stage.init, stage.unroll = {}, choice.unroll
    stage.remat = "all" if choice.remat else "none"
    stage.compute = stage.frozen = choice.precision
    stage.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    stage.optimizer = Optimizer(
        schedule="constant", peak=RATE, b1=BETAS[0], b2=BETAS[1], eps=EPSILON, weight_decay=0.0
    )
    stage.data = dataclasses.replace(stage.data, rows=choice.rows, examples=choice.rows)
    attention = choice.attention or ("cudnn" if gpu and choice.size == "real" else "xla")
    if attention == "cudnn":
        stage.parts["vision_encoder"].fields["attention"] = "cudnn"
    if choice.llm_attention == "cudnn":
        stage.parts["llm"].fields["implementation"] = "cudnn"
    return stage


def sizes_of(stage: Any) -> dict[str, dict[str, Any]]:
    """{part: sizes of its network}, for the other side."""
    from xllm_jax.core import lookup

    return {
        name: lookup.size_row(
            lookup.attribute("xllm_jax.models", part.network)[0].SIZES, part.size, name
        )
        | part.fields
        for name, part in stage.parts.items()
    }


def batch_of(stage: Any) -> Any:
    """Full rows: a picture's embeddings, a prompt, an answer; drawn numbers."""
    from xllm_jax.core.batch import ConversationBatch, Media

    rng, data = np.random.default_rng(0), stage.data
    rows, length, answers = data.rows, data.length, data.answers
    sizes = sizes_of(stage)
    side, vocabulary = sizes["vision_encoder"]["image_size"], sizes["llm"]["vocab"]
    seen, queries = length - answers, sizes["image_interface"]["queries"]
    ids = rng.integers(5, vocabulary - 5, (rows, length)).astype(np.int32)
    place = np.arange(length, dtype=np.int32)
    positions = np.stack([np.minimum(place, seen - 1), np.maximum(place - seen + 1, 0)], -1)
    last = np.tile(place[seen - 1 : length - 1], (rows, 1))
    index = np.full((rows, length), -1, np.int32)
    index[:, 1 : 1 + queries] = np.arange(queries)
    picture = rng.normal(size=(rows, 1, side, side, 3)).astype(np.float32)
    one = np.ones((rows, 1), np.int32)
    return ConversationBatch(
        ids=ids,
        positions=np.tile(positions, (rows, 1, 1)),
        segments=np.ones((rows, length), np.int32),
        context=np.tile(place < seen, (rows, 1)),
        answer_index=last,
        targets=np.take_along_axis(ids, last + 1, axis=1),
        weights=np.ones((rows, answers), np.float32),
        media={"image": Media(picture, one, one * queries, index)},
    )


def spread(state: Any) -> Any:
    """The state with matrices and biases that are large enough for the loss to depend on each part.

    Fresh ones are so small that a wrong vision encoder would change no digit of the loss.
    """
    import jax

    rng = np.random.default_rng(1)

    def drawn(path: Any, leaf: Any) -> Any:
        if jax.tree_util.keystr(path, simple=True, separator="/").endswith("scale"):
            return leaf
        values = rng.normal(scale=SPREAD, size=leaf.shape).astype(leaf.dtype)
        return jax.device_put(values, leaf.sharding)

    halves = {name: getattr(state, name) for name in ("trainable", "frozen")}
    return dataclasses.replace(state, **jax.tree_util.tree_map_with_path(drawn, halves))


def jax_side(choice: argparse.Namespace) -> dict[str, Any]:
    """Compiles and times our step; writes the weights for the other side where they are small."""
    import jax

    from xllm_jax.assembly.system import System
    from xllm_jax.core import flops, mesh, rules

    device = jax.devices()[0]
    stage = stage_of(choice, device.platform == "gpu")
    device_mesh = mesh.make(stage.mesh)
    trainer = Trainer(System.build(stage, device_mesh))
    state = trainer.initial_state()
    if choice.size == "tiny":
        state = spread(state)
        params = rules.flatten(rules.join(state.trainable, state.frozen))
        arrays = {path: np.asarray(leaf, np.float32) for path, leaf in params.items()}
        np.savez(Path(choice.folder) / "weights.npz", **arrays)
    with jax.set_mesh(device_mesh):
        batch = mesh.to_global(device_mesh, batch_of(stage))
        useful = flops.useful(trainer.loss, state.trainable, state.frozen, batch)
        started = time.monotonic()
        step = trainer.step.lower(state, batch).compile()
        compiling = time.monotonic() - started
        holder = {"state": state}

        def advance() -> Any:
            holder["state"], metrics = step(holder["state"], batch)
            return metrics["loss"]

        del state
        losses, seconds = timed(choice, advance, lambda x: jax.block_until_ready(x), float)
    chip = chips.chip_of(device.device_kind)
    return {
        "device": device.device_kind,
        "version": f"jax {jax.__version__}",
        "losses": losses,
        "seconds": seconds,
        "compile_seconds": compiling,
        "peak_gib": (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / GIB,
        "useful_flops": useful,
        "peak_flops": chip.flops if chip else 0.0,
        "tokens": int(np.size(batch.ids)),
    }


def timed(
    choice: argparse.Namespace, advance: Any, wait: Any, number: Any, warm: int = 3
) -> tuple[list[float], list[float]]:
    """Warms up, then rounds: (losses of the first steps and the last, seconds a step by round)."""
    losses = [number(advance()) for _ in range(warm)]
    seconds = []
    for _ in range(choice.rounds):
        started = time.monotonic()
        for _ in range(choice.steps):
            last = advance()
        wait(last)
        seconds.append((time.monotonic() - started) / choice.steps)
    return [*losses, number(last)], seconds


def run_side(choice: argparse.Namespace, side: str, folder: str) -> dict[str, Any]:
    """One side in a process of its own."""
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")
    command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}", f"--folder={folder}"]
    subprocess.run(command, check=True, env=environment)
    return json.loads((Path(folder) / f"{side}.json").read_text())


def report(choice: argparse.Namespace, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Prints a line a side and the ratio; returns everything for the file."""
    useful = next((r["useful_flops"] for r in found.values() if "useful_flops" in r), 0.0)
    peak = next((r["peak_flops"] for r in found.values() if "peak_flops" in r), 0.0)
    for side, result in found.items():
        result["step_seconds"] = best = float(np.median(result["seconds"]))
        result["mfu"] = useful / best / peak if peak else None
        print(
            f"{side}: {best * 1e3:.1f} ms a step (rounds {min(result['seconds']) * 1e3:.1f} to "
            f"{max(result['seconds']) * 1e3:.1f}), {choice.rows / best:.1f} samples/s, MFU "
            + (f"{result['mfu']:.1%}" if peak else "unknown: no peak for this device")
            + f", {result['peak_gib']:.1f} GiB, compiled in {result['compile_seconds']:.0f} s"
            + f" ({result['version']}, {result['device']})"
        )
    made = {"choice": vars(choice), "useful_flops": useful, "peak_flops": peak, "sides": found}
    if {"jax", "torch"} <= found.keys():
        made["ratio"] = found["torch"]["step_seconds"] / found["jax"]["step_seconds"]
        print(f"{useful / 1e12:.3f} TFLOP a step; ours is {made['ratio']:.2f} x as fast as PyTorch")
    return made


def compare(found: dict[str, dict[str, Any]], most: float) -> None:
    """Raises `SystemExit` where the losses of the two sides differ by more than `most`."""
    ours, theirs = (np.asarray(found[side]["losses"]) for side in ("jax", "torch"))
    worst = float(np.abs(ours / theirs - 1).max())
    print(f"losses differ by at most {worst:.1e}: {ours.tolist()} {theirs.tolist()}")
    if not worst < most:
        raise SystemExit("the two sides do not compute the same")


def main() -> None:
    """Runs both sides, or is one of them."""
    choice = options()
    if choice.side:
        if choice.side == "jax":
            result = jax_side(choice)
        else:
            import stage2_image_torch

            result = stage2_image_torch.side(choice)
        (Path(choice.folder) / f"{choice.side}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {side: run_side(choice, side, folder) for side in choice.sides.split(",")}
    made = report(choice, found)
    if choice.size == "tiny" and len(found) == 2:
        compare(found, AGREE[choice.precision])
    if choice.output:
        Path(choice.output).write_text(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
