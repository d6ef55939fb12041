"""Records a second of our pipelines beside a PyTorch DataLoader's and tf.data's, on CPU.

PYTHONPATH=. python benchmarks/data_pipelines.py [--folder=DIR] [--rounds=7] [--workers]

Needs torch, kaldi-native-fbank and, for its column, TensorFlow; none of them belongs to the
project's requirements. All contenders run in turn, each in a process of its own, without threads or
workers beside it; figures are by CPU time, the median of several rounds, which other work on the
machine disturbs little. `--workers` measures instead how one and two workers scale, by the clock.
What they decode is compared first.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_media
import data_peers
import numpy as np
import torch

from xllm_jax.core.stage import Data, Source
from xllm_jax.data.media import image, speech, video
from xllm_jax.data.pipeline import Pipeline

TOKENIZER = (
    Path(__file__).parents[1] / "xllm_jax" / "data" / "synthetic_world" / "backbones" / "llm"
)
IMAGE = {"size": data_peers.SIZE, "scale": (0.5, 1.0), "flip": True}
# Stage 3 as the paper mixes it: instructions about images, utterances, clips, spoken questions.
MIXED = {"image": 3.5, "speech": 2.0, "video": 1.0, "spoken": 3.5}
ROWS = {"image": {"image": 1.0}, "video": {"video": 1.0}, "speech": {"speech": 1.0}, "mixed": MIXED}
EXAMPLES = {"image": 16, "video": 4, "speech": 16, "mixed": 20}
ITEMS = {"image": 1, "video": data_peers.FRAMES, "speech": 1}


def ours(folder: Path, row: str, **fields: Any) -> Iterator[Any]:
    """Endless batches of our pipeline: media, prompts, packed rows, quarantine."""
    kinds = set(ITEMS) if row == "mixed" else {row}
    data = Data(
        root=str(folder),
        sources={name: Source("instructions", f"{name}.json") for name in ROWS[row]},
        mix=dict(ROWS[row]),
        tokenizer=str(TOKENIZER),
        examples=EXAMPLES[row],
        rows=EXAMPLES[row],
        length=256,
        answers=32,
        items={kind: ITEMS[kind] for kind in sorted(kinds)},
        embeddings=dict.fromkeys(ITEMS, 32),
        frames=(data_peers.LONGEST,),
        image=IMAGE,
        video={"frames": data_peers.FRAMES},
        speech={"specaugment": True},
        **({"threads": 0} | fields),
    )
    return Pipeline(data, quarantine=folder / "quarantine.jsonl").iterate()


def stream(folder: Path, row: str, name: str) -> Iterator[Any]:
    """Endless batches of one contender."""
    media = data_media.write_sources(folder)
    if row == "filterbanks":
        waves = [speech.read(record[0][1]) for record in media["speech"]]
        make = speech.filterbank if name == "ours" else data_peers.kaldi_filterbank
        return (make(wave) for wave in itertools.cycle(waves))
    if name == "ours":
        return ours(folder, row)
    if name == "torch":
        return data_peers.torch_batches(media, ROWS[row], EXAMPLES[row])
    paths = [record[0][1] for record in media[row]]
    return data_peers.tensorflow_batches(row, paths, EXAMPLES[row])


def serve(folder: Path, row: str, name: str) -> None:
    """A contender's life: for each line, that many batches, and the CPU seconds since the last.

    What it computes ahead between two turns is counted in the second.
    """
    torch.set_num_threads(1)
    batches, before = stream(folder, row, name), 0.0
    for line in sys.stdin:
        for _ in range(int(line)):
            next(batches)
        now = time.process_time()
        print(f"SECONDS {now - before}", flush=True)
        before = now


class Contender:
    """One contender in a process of its own, so that none pays for another's memory or threads."""

    def __init__(self, folder: Path, row: str, name: str):
        command = [sys.executable, __file__, f"--folder={folder}", f"--serve={row}:{name}"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def seconds(self, batches: int) -> float:
        """CPU seconds of the next batches."""
        self.process.stdin.write(f"{batches}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("SECONDS"):
                return float(line.split()[1])
        raise SystemExit("a contender has ended")


def cpu() -> float:
    """CPU seconds of this process and its living children, so far."""
    ticks = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime + ticks / os.sysconf("SC_CLK_TCK")


def in_turn(folder: Path, row: str, names: list[str], batches: int, rounds: int) -> dict:
    """{name: median CPU seconds of a batch}, the contenders in turn in every round."""
    contenders = {name: Contender(folder, row, name) for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            seconds = contender.seconds(batches) / batches
            if number:  # the first round warms up
                rates[name].append(seconds)
    for contender in contenders.values():
        contender.process.stdin.close()
        contender.process.wait()
    return {name: statistics.median(found) for name, found in rates.items()}


def check(media: dict) -> None:
    """Asserts that all contenders decode to the same values, and says how far they are apart."""
    mine = {"image": image.load, "video": video.load, "speech": speech.load}
    for kind, load in mine.items():
        for record in media[kind][:3]:
            path = record[0][1]
            a, b = load(path, {}), data_peers.LOADERS[kind](path, False).numpy()
            b = np.moveaxis(b, 1, -1).reshape(a.shape) if kind != "speech" else b
            np.testing.assert_allclose(a, b, atol=2e-3 if kind == "speech" else 1e-6)
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        return
    for kind, decode in {
        "image": data_peers.tensorflow_image,
        "speech": data_peers.tensorflow_speech,
    }.items():
        path = media[kind][0][0][1]
        apart = np.abs(mine[kind](path, {}) - decode(path, False).numpy()).mean()
        assert apart < 0.02, (kind, apart)
        print(f"tf.data's {kind} is {apart:.5f} from ours on average")


def line(row: str, seconds: dict[str, float], examples: int) -> str:
    """One line of the table: records a second of each, and ours against the best other."""
    best = min(value for name, value in seconds.items() if name != "ours")
    cells = [f"{examples / seconds[n]:.0f}" if n in seconds else "-" for n in NAMES]
    return " | ".join(["", row, *cells, f"{best / seconds['ours']:.2f}", ""]).strip()


NAMES = ("ours", "torch", "tf.data")


def scaling(folder: Path, media: dict, rounds: int) -> None:
    """Prints records a second by the clock, and by CPU time, with one and with two workers."""
    kinds = {
        "ours, threads": lambda n: ours(folder, "mixed", threads=n),
        "ours, processes": lambda n: ours(folder, "mixed", threads=n, deadline=60.0),
        "torch": lambda n: data_peers.torch_batches(media, MIXED, EXAMPLES["mixed"], n),
    }
    print("| mixed | 1 worker | 2 workers | ratio | records per CPU second, 2 workers |")
    for name, start in kinds.items():
        found = {}
        for workers in (1, 2):
            stream = start(workers)
            next(stream)
            clock, used = time.monotonic(), cpu()
            for _ in range(4 * rounds):
                next(stream)
            count = 4 * rounds * EXAMPLES["mixed"]
            found[workers] = count / (time.monotonic() - clock), count / (cpu() - used)
            del stream
        (one, _), (two, work) = found[1], found[2]
        print(f"| {name} | {one:.0f} | {two:.0f} | {two / one:.2f} | {work:.0f} |")


def main() -> None:
    """Writes the media, compares what is decoded, and prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("benchmark_media"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--serve", help="ROW:NAME, used by the benchmark itself")
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.folder, *flags.serve.split(":"))
        return
    torch.set_num_threads(1)
    media = data_media.write_sources(flags.folder)
    if flags.workers:
        scaling(flags.folder, media, flags.rounds)
        return
    check(media)
    names = NAMES if importlib.util.find_spec("tensorflow") else NAMES[:2]
    print(f"| records per CPU second | {' | '.join(NAMES)} | ours / best other |")
    for row in ("filterbanks", *ROWS):
        taking = [name for name in names if name != "tf.data" or row in ("image", "speech")]
        batches = 64 if row == "filterbanks" else 4
        seconds = in_turn(flags.folder, row, taking, batches, flags.rounds)
        print(line(row, seconds, EXAMPLES.get(row, 1)), flush=True)


if __name__ == "__main__":
    main()
