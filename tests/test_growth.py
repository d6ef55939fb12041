"""Thousands of records that cannot be read leave neither memory nor open files behind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import reading
import small_stage

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import modalities

RECORDS = 3000
FILES = 24  # of a kind, each broken in its own way
SUFFIXES = {"image": "png", "video": "mp4", "speech": "wav"}
AHEAD = 4  # files that its threads may have open at a look
MEGABYTES = 6.0  # that may come and go with buffers of decoders


def broken(content: bytes, rng: random.Random) -> bytes:
    """Bytes changed, a part removed or repeated."""
    at, size = rng.randrange(len(content)), rng.randrange(1, 400)
    ways = (
        content[:at],
        content[:at] + rng.randbytes(size) + content[at + size :],
        content[: at % 200] + rng.randbytes(24) + content[at % 200 + 24 :],
        content[:at] + content[at + size :],
    )
    return rng.choice(ways)


def media(folder: Path, kind: str) -> list[str]:
    """Names of files that are broken, and cannot be read."""
    rng, found = random.Random(14), []
    whole = [(folder / f"{number}.{SUFFIXES[kind]}").read_bytes() for number in range(5)]
    while len(found) < FILES:
        file = folder / f"broken{len(found)}.{SUFFIXES[kind]}"
        file.write_bytes(broken(rng.choice(whole), rng))
        try:
            modalities.stored()[kind].read(str(file))
        except UserError:
            found.append(file.name)
    return found


def rows(kind: str, names: list[str], rng: random.Random) -> list[str]:
    """Lines of conversations: one of eight is whole, and the others cannot be read."""
    lines = []
    for number in range(RECORDS):
        row = {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": "看"},
                {"from": "gpt", "value": f"蓝色的方块{number}"},
            ],
        }
        if number % 8 and names:
            row[kind] = rng.choice(names)
        line = json.dumps(row)
        lines.append(line if names or not number % 8 else line[: rng.randrange(1, len(line))])
    return lines


@pytest.mark.parametrize("kind", [*SUFFIXES, "row"])
def test_broken_records_leave_nothing_behind(kind, tmp_path):
    reading.write(tmp_path)
    (tmp_path / "train.json").unlink()
    names = [] if kind == "row" else media(tmp_path, kind)
    lines = rows(kind, names, random.Random(14))
    (tmp_path / "train.jsonl").write_text("\n".join(lines), "utf-8")
    done = subprocess.run(
        [sys.executable, "tests/broken_stream.py", str(tmp_path), str(RECORDS)],
        cwd=small_stage.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    looks = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    read, bad, _, _ = looks[-1]
    assert bad >= 0.8 * read, "most of them cannot be read"
    warm = looks[1:]
    assert (warm[-1][2] - warm[0][2]) / 1024 < MEGABYTES, looks
    files = [files for *_, files in warm]
    assert max(files) - min(files) <= AHEAD, looks
