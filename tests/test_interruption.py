"""What a run sees does not depend on when it was killed, nor on how many hosts go on with it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import forked
import numpy as np
import pytest
import reading
import small_stage
from jax import tree

BATCHES = 16  # more than three epochs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading")
    reading.write(path)
    return path


@pytest.fixture(scope="module")
def whole(folder):
    """Digests of an uninterrupted run's batches."""
    batches = reading.pipeline(folder).iterate()
    made = [next(batches) for _ in range(BATCHES)]
    modalities = made[0][0].media.keys()
    assert modalities == {"image", "video", "speech"}
    assert all(any(b.media[m].lengths.any() for b, _ in made) for m in modalities)
    found = [reading.digest(batch, info["keys"]) for batch, info in made]
    assert len(set(found)) == BATCHES, "augmentation and order differ in every epoch"
    return found


@pytest.fixture(scope="module")
def position(folder, whole):
    """Where a reader stands that was killed by signal 9 at a random moment."""
    process = forked.Popen(
        [sys.executable, "tests/reading.py", str(folder)],
        cwd=small_stage.ROOT,
        env=os.environ | {"PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdin.write("go on\n" * (BATCHES - 6))
    process.stdin.flush()
    seen = [process.stdout.readline().strip() for _ in range(random.randint(4, 9))]
    process.kill()
    process.communicate()
    assert seen == whole[: len(seen)]
    text = (folder / "position.json").read_text()
    assert len(text) < 10_000
    return json.loads(text)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_a_killed_reader_goes_on_with_the_same_arrays(folder, whole, position, hosts):
    start = position["next_index"]
    assert 0 < start < BATCHES - 4
    pipelines = [reading.pipeline(folder, host, hosts, threads=1) for host in range(hosts)]
    readers = [pipeline.iterate(position) for pipeline in pipelines]
    for number in range(start, BATCHES):
        parts = [next(reader) for reader in readers]
        batch = tree.map(lambda *x: np.concatenate(x), *[batch for batch, _ in parts])
        keys = [key for _, info in parts for key in info["keys"]]
        assert reading.digest(batch, keys) == whole[number]
        assert len(json.dumps(readers[0].position())) < 10_000
