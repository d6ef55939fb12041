"""Two hundred ways to damage a checkpoint: each is refused by name, or changes nothing."""

from __future__ import annotations

import json
import shutil

import numpy as np
import published
import pytest

from xllm_jax.convert import run_import
from xllm_jax.core.errors import UserError

MUTATIONS, CHUNK = 200, 25


def some(generator, choices):
    choices = list(choices)
    return choices[generator.integers(len(choices))]


def lose(generator, tensors):
    del tensors[some(generator, tensors)]


def rename(generator, tensors):
    name = some(generator, tensors)
    place = int(generator.integers(len(name)))
    tensors[f"{name[:place]}{some(generator, 'x7.')}{name[place + 1 :]}z"] = tensors.pop(name)


def add(generator, tensors):
    name = some(generator, tensors)
    tensors[f"{name}.{generator.integers(9)}"] = tensors[name]


def reshape(generator, tensors):
    name = some(generator, tensors)
    tensor = tensors[name]
    flat = tensor.ndim > 1 and generator.random() < 0.5
    tensors[name] = tensor.reshape(-1) if flat else tensor[None]


def cut(generator, tensors):
    name = some(generator, tensors)
    axis = int(generator.integers(tensors[name].ndim))
    count = int(generator.integers(tensors[name].shape[axis]))
    tensors[name] = np.take(tensors[name], range(count), axis)


def cast(generator, tensors):
    name = some(generator, tensors)
    kind = some(generator, (np.float32, np.float64, np.int32, np.int8, np.bool_))
    tensors[name] = tensors[name].astype(kind)


def poison(generator, tensors):
    name = some(generator, tensors)
    tensors[name] = tensors[name].copy()
    value = some(generator, (np.nan, np.inf, -np.inf))
    tensors[name].flat[generator.integers(tensors[name].size)] = value


def truncate(generator, folder):
    file = shard(generator, folder)
    data = file.read_bytes()
    file.write_bytes(data[: generator.integers(len(data))])


def append(generator, folder):
    file = shard(generator, folder)
    file.write_bytes(file.read_bytes() + generator.bytes(int(generator.integers(1, 99))))


def remove(generator, folder):
    shard(generator, folder).unlink()


def repeat(generator, folder):
    """The index is gone, and one shard lies there twice."""
    file = shard(generator, folder)
    next(folder.glob("*.index.json")).unlink()
    shutil.copy(file, file.with_name(f"again{file.suffix}"))


def misplace(generator, folder):
    """The index sends a tensor to another shard."""
    index = next(folder.glob("*.index.json"))
    places = json.loads(index.read_text())["weight_map"]
    places[some(generator, places)] = some(generator, set(places.values()) | {"more.bin"})
    index.write_text(json.dumps({"weight_map": places}))


def flip(generator, folder):
    """One bit of what describes the tensors, not of their numbers."""
    file = shard(generator, folder)
    data = bytearray(file.read_bytes())
    if file.suffix == ".bin":
        start, length = data.index(b"data.pkl"), data.index(b"PK", data.index(b"data.pkl"))
    else:
        start, length = 0, 8 + int.from_bytes(data[:8], "little")
    place = int(generator.integers(start, length))
    data[place] ^= 1 << int(generator.integers(8))
    file.write_bytes(data)


def shard(generator, folder):
    return some(generator, sorted(folder.glob("model-0*")))


TENSORS = (lose, rename, add, reshape, cut, cast, poison)
FILES = (truncate, append, remove, repeat, misplace, flip)


def converted(folder) -> dict[str, np.ndarray]:
    """All leaves, read as the command reads them, without the writing."""
    leaves = run_import.examine("chatglm", folder).leaves
    read = {path: list(run_import.as_blocks(path, leaf).blocks()) for path, leaf in leaves.items()}
    return {path: np.concatenate(blocks) for path, blocks in read.items()}


def damage(seed, folder):
    """Writes a good checkpoint, damages it, and says how."""
    generator = np.random.default_rng(seed)
    kinds = TENSORS + FILES
    change, end = kinds[seed % len(kinds)], some(generator, ("bin", "safetensors"))
    tensors, leaves = published.tensors_of("chatglm")
    if change in TENSORS:
        change(generator, tensors)
    published.write_shards(tensors, folder, end, count=2)
    if change in FILES:
        change(generator, folder)
    return f"{seed}: {change.__name__} in {end}", leaves


@pytest.mark.parametrize("start", range(0, MUTATIONS, CHUNK))
def test_damage_is_refused_by_name_or_harmless(start, tmp_path):
    refused = 0
    for seed in range(start, start + CHUNK):
        folder = tmp_path / str(seed)
        what, leaves = damage(seed, folder)
        try:
            held = converted(folder)
        except UserError as error:
            assert str(folder) in str(error) and "\n" not in str(error) and error.hint, what
            refused += 1
            continue
        assert held.keys() == leaves.keys(), what
        for path, leaf in leaves.items():  # a wider dtype holds the same numbers
            np.testing.assert_array_equal(held[path], leaf, err_msg=f"{what}: {path}")
            assert np.can_cast(leaf.dtype, held[path].dtype), what
    assert refused > CHUNK // 2


def test_what_is_not_damaged_is_taken(tmp_path):
    for end in ("bin", "safetensors"):
        tensors, leaves = published.tensors_of("chatglm")
        folder = published.write_shards(tensors, tmp_path / end, end, count=2)
        held = converted(folder)
        assert all(held[path].tobytes() == leaf.tobytes() for path, leaf in leaves.items())
