"""Our networks against eager PyTorch on one pinned CPU thread, float32, by process CPU time.

PYTHONPATH=. python benchmarks/cpu.py [--rows=vit_forward,qformer_backward] [--repetitions=40]
    [--compile_seconds=120] [--core=1] [--json=FILE]

Both sides run in one process, in turn, on the same weights and inputs (`cpu_rows.py`). What they
give, gradients of all parameters included, is compared first: a row whose results differ ends the
run with an error. Then each repetition runs both (and what torch.compile made of the PyTorch side,
where that works within `--compile_seconds`) right after each other, in changing order. A ratio is
PyTorch's CPU time over ours in one repetition: above 1, ours is faster. The table has the median of
the repetitions and the 95 % interval of that median.

Stacks of ours are unrolled, as suits a CPU (`unroll` in a stage). Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cpu_rows
import jax
import jax.numpy as jnp
import numpy as np
import torch
from cpu_pair import Compared, Pair
from scipy import stats
from torch._inductor import config as inductor

from xllm_jax.core.text_lines import split_lines

LEAST = 0.01  # seconds of CPU time of one measurement; shorter work is repeated within it
AGREE = 2e-4  # largest difference, of the largest value


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", default=",".join(cpu_rows.ROWS))
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--size", choices=("medium", "tiny"), default="medium")
    parser.add_argument("--compile_seconds", type=int, default=120, help="0 = no torch.compile")
    parser.add_argument("--core", type=int, default=-1, help="the first allowed one by default")
    parser.add_argument("--json", default="")
    found = parser.parse_args(argv)
    found.rows = found.rows.split(",")
    for row in found.rows:
        if row not in cpu_rows.ROWS:
            parser.error(f"no row {row}: {', '.join(cpu_rows.ROWS)}")
    return found


@contextlib.contextmanager
def pinned(core: int) -> Iterator[int]:
    """One thread of PyTorch and one core for all threads; yields the core."""
    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    core = min(allowed) if core < 0 else core
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        yield core
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def agree(row: str, compared: Compared) -> float:
    """The largest difference of the two sides, each of the largest value of its array.

    Raises:
      SystemExit: they do not compute the same.
    """
    made = [(what, np.asarray(x), np.asarray(y)) for what, x, y in compared]
    # Gradients that are zero but for rounding, as those of key biases, have no size of their own.
    least = 1e-3 * max(np.abs(theirs).max() for _, _, theirs in made)
    worst = 0.0
    for what, ours, theirs in made:
        if ours.shape != theirs.shape:
            raise SystemExit(f"{row}: {what} is {ours.shape} here, {theirs.shape} in PyTorch")
        if theirs.dtype.kind != "f":
            if not np.array_equal(ours, theirs):
                raise SystemExit(f"{row}: {what} differ: {ours.tolist()}, {theirs.tolist()}")
            continue
        far = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), least)
        if not far <= AGREE:  # NaN, too
            raise SystemExit(f"{row}: {what} differs by {far:.1e} of its largest value")
        worst = max(worst, float(far))
    return worst


def compiled(pair: Pair, seconds: int) -> Callable[[], Any] | str:
    """The PyTorch side under torch.compile, or why there is none."""

    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    started = time.monotonic()
    try:
        torch.compiler.reset()
        inductor.compile_threads = 1  # no processes beside this one
        run = pair.theirs(torch.compile)
        run()
        run()
    except Exception as error:  # whatever a compiler does
        # The compiler wraps an alarm in an error of its own.
        late_now = time.monotonic() - started >= seconds
        return f"not within {seconds} s" if late_now else f"fails: {type(error).__name__}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return run


def clocked(run: Callable[[], Any], times: int) -> float:
    """CPU seconds of the whole process for one run, as the mean of `times`."""
    started = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - started) / times


def timed(runs: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, np.ndarray]:
    """{side: CPU seconds `[repetitions]`}, the sides in turn and in changing order."""
    times = {side: max(1, math.ceil(LEAST / clocked(run, 2))) for side, run in runs.items()}
    orders = itertools.cycle(itertools.permutations(runs))
    found: dict[str, list[float]] = {side: [] for side in runs}
    for _ in range(repetitions):
        for side in next(orders):
            found[side].append(clocked(runs[side], times[side]))
    return {side: np.array(seconds) for side, seconds in found.items()}


def median(ratios: np.ndarray) -> dict[str, float]:
    """Median, and its 95 % interval by ranks: of no distribution in particular."""
    ordered, count = np.sort(ratios), len(ratios)
    first = int(stats.binom.ppf(0.025, count, 0.5))
    low, high = ordered[max(first - 1, 0)], ordered[min(count - first, count - 1)]
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measured(row: str, choice: argparse.Namespace) -> dict[str, Any]:
    """Compares, then measures a row."""
    make, goal = cpu_rows.ROWS[row]
    pair = make(choice.size)
    runs = {"ours": pair.ours, "eager": pair.theirs(lambda call: call)}
    far = agree(row, pair.compared(*(run() for run in runs.values())))
    why = "not tried"
    if choice.compile_seconds:
        made = compiled(pair, choice.compile_seconds)
        if isinstance(made, str):
            why = made
        else:
            agree(f"{row}, torch.compile", pair.compared(pair.ours(), made()))
            runs["compiled"] = made
    seconds = timed(runs, choice.repetitions)
    result = {"row": row, "sizes": pair.sizes, "goal": goal, "difference": far}
    result |= {f"{side}_ms": 1e3 * float(np.median(x)) for side, x in seconds.items()}
    result["ratio"] = median(seconds["eager"] / seconds["ours"])
    other = seconds.get("compiled")
    result["compiled"] = why if other is None else median(other / seconds["ours"])
    return result


def products(side: int = 1024, times: int = 5) -> dict[str, float]:
    """GFLOP/s of a square matrix product: what the two sides' libraries make of this CPU.

    PyTorch's MKL has slower kernels where the CPU is not Intel's, and every ratio shows it.
    """
    x = torch.ones(side, side)
    y = jnp.ones((side, side))
    product = jax.jit(jnp.matmul)
    runs = {"PyTorch": lambda: x @ x, "XLA": lambda: jax.block_until_ready(product(y, y))}
    made = {
        name: (run(), min(clocked(run, 1) for _ in range(times)))[1] for name, run in runs.items()
    }
    return {name: 2 * side**3 / seconds / 1e9 for name, seconds in made.items()}


def machine(core: int) -> dict[str, Any]:
    """What the figures hold for."""
    told = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    lines = split_lines(told)
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": models[core] if core < len(models) else platform.processor(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        **{
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", "torch", "transformers")
        },
    }


def line(result: dict[str, Any]) -> str:
    """A row of the table."""

    def told(found: dict[str, float] | str) -> str:
        if isinstance(found, str):
            return found
        return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"

    cells = [
        result["row"],
        result["sizes"],
        f"{result['ours_ms']:.2f}",
        f"{result['eager_ms']:.2f}",
    ]
    goal, ratio = result["goal"], result["ratio"]
    missed = "" if goal is None or ratio["median"] >= goal else ", missed"
    aim = "none" if goal is None else f"{goal:g}{missed}"
    cells += [told(ratio), aim, told(result["compiled"])]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    """Prints the table, a row as soon as it is measured."""
    choice = options(argv)
    results = []
    with pinned(choice.core) as core:
        about = machine(core) | {"repetitions": choice.repetitions}
        print(", ".join(f"{name} {value}" for name, value in about.items()))
        rates = products()
        told = ", ".join(f"{rate:.0f} GFLOP/s in {name}" for name, rate in rates.items())
        print(f"A matrix product of 1024 x 1024: {told}.\n")
        print("| row | sizes | ours, ms | eager, ms | eager / ours | goal | torch.compile / ours |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for row in choice.rows:
            results.append(measured(row, choice))
            print(line(results[-1]), flush=True)
    if choice.json:
        Path(choice.json).write_text(
            json.dumps({"machine": about | {"products": rates}, "rows": results}, indent=1)
        )


if __name__ == "__main__":
    main()
