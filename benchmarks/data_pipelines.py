"""Records a second of our pipelines beside a PyTorch DataLoader's and tf.data's, on CPU.

PYTHONPATH=. python benchmarks/data_pipelines.py [--folder=DIR] [--rounds=7] [--workers]

Needs torch, kaldi-native-fbank and, for its column, TensorFlow; none of them belongs to the
project's requirements. All contenders run in turn in one process, without threads or workers of
their own; figures are by CPU time, the median of several rounds, which other work on the machine
disturbs little. `--workers` measures instead how one and two workers scale, by the clock. What they
decode is compared first.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_media
import data_peers
import numpy as np
import torch

from xllm_jax.core.stage import Data, Source
from xllm_jax.data import image, speech, video
from xllm_jax.data.pipeline import Pipeline

TOKENIZER = Path(__file__).parents[1] / "xllm_jax" / "data" / "world" / "backbones" / "llm"
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


def contenders(folder: Path, media: dict, row: str) -> dict[str, Iterator[Any]]:
    """{name: endless batches} of everything that can decode a row."""
    found = {
        "ours": ours(folder, row),
        "torch": data_peers.torch_batches(media, ROWS[row], EXAMPLES[row]),
    }
    if row in ("image", "speech"):
        try:
            paths = [record[0][1] for record in media[row]]
            found["tf.data"] = data_peers.tensorflow_batches(row, paths, EXAMPLES[row])
        except ImportError:
            print("TensorFlow is not installed; its column is left out")
    return found


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


def in_turn(
    contenders: dict[str, Iterator[Any]], batches: int, rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of a batch of each contender, all of them in turn in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, stream in contenders.items():
            start = clock()
            for _ in range(batches):
                next(stream)
            if number:  # the first round warms up
                seconds[name].append((clock() - start) / batches)
    return {name: statistics.median(values) for name, values in seconds.items()}


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


def filterbanks(media: dict, rounds: int) -> dict[str, float]:
    """Seconds for the features of one utterance, ours and kaldi-native-fbank's."""
    waves = [speech.read(record[0][1]) for record in media["speech"]]

    def endless(features: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        while True:
            yield from map(features, waves)

    kaldi = data_peers.kaldi_filterbank
    streams = {"ours": endless(speech.filterbank), "torch": endless(kaldi)}
    return in_turn(streams, len(waves), rounds, time.process_time)


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
    flags = parser.parse_args()
    torch.set_num_threads(1)
    media = data_media.write_sources(flags.folder)
    if flags.workers:
        scaling(flags.folder, media, flags.rounds)
        return
    check(media)
    print(f"| records per CPU second | {' | '.join(NAMES)} | ours / best other |")
    print(line("filterbanks", filterbanks(media, flags.rounds), 1))
    for row in ROWS:
        seconds = in_turn(contenders(flags.folder, media, row), 4, flags.rounds, time.process_time)
        print(line(row, seconds, EXAMPLES[row]), flush=True)


if __name__ == "__main__":
    main()
