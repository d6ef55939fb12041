"""A stream of conversations with pictures, clips and speech, read by a process that may be killed.

python tests/reading.py FOLDER      reads FOLDER/train.json, from FOLDER/position.json on
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jax import tree
from PIL import Image
from small_stage import TOKENIZER
from test_video import write as write_video

from xllm_jax.core.stage import Data, Source
from xllm_jax.data.pipeline import Pipeline

EXAMPLES = 8
MEDIA = (("image",), ("video",), ("speech",), ("image", "speech"), ())


def write(folder: Path) -> None:
    """Five files of each kind, and 40 conversations about them."""
    random = np.random.default_rng(0)
    suffixes = {"image": "png", "video": "mp4", "speech": "wav"}
    for number in range(5):
        pixels = random.integers(0, 255, (40, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        write_video(folder / f"{number}.mp4", 6 + number)
        wave = random.normal(size=8000 + 2000 * number) * 0.1
        soundfile.write(folder / f"{number}.wav", wave, 16000)
    rows = [
        {
            "id": str(n),
            **{kind: f"{n // 5 % 5}.{suffixes[kind]}" for kind in MEDIA[n % 5]},
            "transcript": "红色的圆",
            "conversations": [
                {"from": "human", "value": "看" * (1 + n % 7)},
                {"from": "gpt", "value": f"蓝色的方块{n}"},
            ],
        }
        for n in range(40)
    ]
    (folder / "train.json").write_text(json.dumps(rows))


def pipeline(
    folder: Path, host: int = 0, hosts: int = 1, threads: int = 2, bad: float = 0.01
) -> Pipeline:
    """The stream with random crops, mirrored pictures and SpecAugment."""
    data = Data(
        sources={"all": Source("instructions", str(folder))},
        tokenizer=str(TOKENIZER),
        examples=EXAMPLES,
        rows=4,
        length=96,
        answers=32,
        items={"image": 2, "video": 4, "speech": 2},
        embeddings={"image": 3, "video": 3, "speech": 8},
        frames=(120,),
        image={"size": 24, "scale": (0.3, 1.0), "flip": True},
        video={"frames": 2},
        speech={"specaugment": {"time_width": 20}},
        threads=threads,
        max_bad_share=bad,
    )
    return Pipeline(data, 5, host, hosts)


def digest(batch: Any, keys: list[str]) -> str:
    """Of every array of a batch, and of what stands in its rows."""
    found = hashlib.sha256(json.dumps(keys).encode())
    for path, leaf in tree.leaves_with_path(batch):
        found.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def main(folder: Path) -> None:
    """Prints a digest for every line it is given; saves its position behind every second."""
    file = folder / "position.json"
    batches = pipeline(folder).iterate(json.loads(file.read_text()) if file.exists() else None)
    for number, _ in enumerate(sys.stdin):
        batch, info = next(batches)
        print(digest(batch, info["keys"]), flush=True)
        if number % 2:
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(batches.position()))
            os.replace(partial, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
