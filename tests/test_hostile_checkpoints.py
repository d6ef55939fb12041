"""Checkpoints of strangers: they are read within their own bytes, or refused in one line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from xllm_jax.convert import files, weight_files
from xllm_jax.convert.safetensors_file import SafetensorsFile
from xllm_jax.convert.sources import chatglm
from xllm_jax.convert.torchscript import TorchScriptFile
from xllm_jax.core.errors import UserError


@dataclasses.dataclass
class Module:
    """A module of TorchScript."""

    state: dict


@dataclasses.dataclass
class Tensor:
    """Where a tensor says that it lies."""

    offset: object
    shape: tuple
    strides: tuple


def written(value, memo):
    """A value as a pickle has it; modules are remembered, as PyTorch does."""
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, tuple):
        return b"(" + b"".join(written(one, memo) for one in value) + b"t"
    if isinstance(value, Tensor):
        storage = b"(" + written("storage", memo) + b"ctorch\nFloatStorage\n"
        storage += b"".join(written(one, memo) for one in ("0", "cpu", 16)) + b"tQ"
        rest = (value.offset, value.shape, value.strides, False, None)
        rebuilt = storage + b"".join(written(one, memo) for one in rest)
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + rebuilt + b"tR"
    if not isinstance(value, Module):
        return pickle.dumps(value, 2)[2:-1]
    if id(value) in memo:
        return b"j" + struct.pack("<I", memo[id(value)])
    memo[id(value)] = len(memo)
    made = b"c__torch__\nM\n)\x81r" + struct.pack("<I", memo[id(value)]) + b"}("
    items = b"".join(written(name, memo) + written(one, memo) for name, one in value.state.items())
    return made + items + b"ub"


def archive(path, module, storage=b"", extra=b""):
    content = b"\x80\x02" + extra + written(module, {}) + b"."
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("m/data.pkl", content)
        file.writestr("m/code/m.py", "")
        file.writestr("m/data/0", storage)
    return path


FLOATS = np.arange(16, dtype=np.float32)
OUTSIDE = {
    "strides cancel": (0, (64, 64), (64, -64)),
    "far": (0, (2, 2), (2**40, -(2**40))),
    "far and back": (8, (2, 2), (2**62, 1)),
    "negative offset": (-4, (4,), (1,)),
    "negative step": (15, (16,), (-1,)),
    "no step": (0, (2**20, 2**20), (0, 0)),
    "one too many": (1, (16,), (1,)),
    "one step too many": (0, (4, 4), (5, 1)),
    "offset behind": (16, (1,), (1,)),
    "scalar behind": (16, (), ()),
    "fewer strides": (0, (4, 4), (4,)),
    "more strides": (0, (4,), (4, 1)),
    "a text": (0, ("4",), (1,)),
    "a fraction": (0, (4.0,), (1,)),
    "negative length": (0, (-4, -4), (4, 1)),
    "zero and huge": (0, (0, 2**62), (1, 1)),
    "numbers without end": (0, (10**100,), (1,)),
    "offset of a text": ("0", (4,), (1,)),
    "overlapping": (0, (9, 8), (1, 1)),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_a_tensor_outside_of_its_storage_is_refused(case, tmp_path):
    place = archive(tmp_path / "a.pt", Module({"w": Tensor(*OUTSIDE[case])}), FLOATS.tobytes())
    with pytest.raises(UserError, match=r"a\.pt"):
        TorchScriptFile(place)["w"]


def test_views_are_exactly_those_that_lie_within(tmp_path):
    """Against all places that the numbers reach, one by one."""
    generator = random.Random(0)
    for number in range(300):
        shape = tuple(generator.randint(0, 4) for _ in range(generator.randint(0, 3)))
        strides = tuple(generator.randint(0, 7) for _ in shape)
        offset = generator.randint(0, 17)
        reached = [
            offset + sum(n * s for n, s in zip(at, strides))
            for at in itertools.product(*map(range, shape))
        ]
        path = tmp_path / f"{number}.pt"
        module = Module({"w": Tensor(offset, shape, strides)})
        source = TorchScriptFile(archive(path, module, FLOATS.tobytes()))
        if len(reached) <= 16 and all(0 <= at < 16 for at in reached):
            np.testing.assert_array_equal(source["w"].ravel(), FLOATS[reached])
            assert source["w"].shape == shape == source.header("w").shape
        else:
            with pytest.raises(UserError):
                source["w"]


def test_shared_modules_are_walked_once(tmp_path):
    """2 kB that hold 2**60 paths."""
    module = Module({})
    for _ in range(60):
        module = Module({"a": module, "b": module})
    began = time.monotonic()
    assert len(TorchScriptFile(archive(tmp_path / "a.pt", module))) == 0
    with_tensor = Module({"w": Tensor(0, (4,), (1,))})
    both = Module({"a": with_tensor, "b": with_tensor})
    source = TorchScriptFile(archive(tmp_path / "b.pt", both, FLOATS.tobytes()))
    assert sorted(source) == ["a.w", "b.w"]  # as a state dict has them
    module = with_tensor
    for _ in range(60):
        module = Module({"a": module, "b": module})
    with pytest.raises(UserError, match="not a TorchScript archive"):
        TorchScriptFile(archive(tmp_path / "c.pt", module))
    assert time.monotonic() - began < 20


def test_deep_and_circular_modules_are_refused(tmp_path):
    module = Module({})
    for _ in range(100):
        module = Module({"a": module})
    circle = Module({})
    circle.state["a"] = circle
    for name, one in (("deep", module), ("circle", circle)):
        with pytest.raises(UserError, match="not a TorchScript archive"):
            TorchScriptFile(archive(tmp_path / name, one))


def test_a_memo_without_end_is_refused(tmp_path):
    """The unpickler would make a table of 2**31 places."""
    extra = b"N" + b"r" + struct.pack("<I", 2**31 - 1) + b"0"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="not a TorchScript archive"):
        TorchScriptFile(archive(tmp_path / "a.pt", Module({}), extra=extra))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize("name", ["a.pt", "a.pth"])
def test_an_entry_that_unpacks_to_too_much_is_refused(name, tmp_path):
    code = {"a.pt": "m/code/a.py", "a.pth": "m/version"}[name]
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(code, "")
        file.writestr("m/data.pkl", bytes(50_000_000))
    with pytest.raises(UserError, match=r"would unpack to 50,000,000 bytes"):
        files.open_checkpoint(tmp_path / name)


def safetensors(path, header, data=b"\0" * 16, length=None):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(content) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + content + data)
    return path


def entry(**changes):
    return {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


HEADERS = {
    "integer": {"w": 3},
    "null": {"w": None},
    "list": {"w": [1, 2]},
    "text": {"w": "F32"},
    "no object": [1],
    "nothing": None,
    "dtype list": entry(dtype=["F32"]),
    "dtype null": entry(dtype=None),
    "dtype number": entry(dtype=7),
    "shape null": entry(shape=None),
    "shape number": entry(shape=4),
    "shape texts": entry(shape=["4"]),
    "shape fractions": entry(shape=[4.0]),
    "shape truth": entry(shape=[True, 4]),
    "shape negative": entry(shape=[-4]),
    "shape huge": entry(shape=[2**62]),
    "shape zero and huge": entry(shape=[0, 2**62], data_offsets=[0, 0]),
    "shape of thousands": entry(shape=[10**4000]),
    "offsets null": entry(data_offsets=None),
    "offsets one": entry(data_offsets=[0]),
    "offsets texts": entry(data_offsets=["0", "16"]),
    "offsets backwards": entry(data_offsets=[16, 0]),
    "offsets negative": entry(data_offsets=[-16, 0]),
    "offsets beyond": entry(data_offsets=[0, 2**62]),
    "deep": b"[" * 100_000,
    "digits": b'{"w": ' + b"9" * 10_000 + b"}",
    "long name": {"x" * 100_000: {"dtype": "F32", "shape": [4], "data_offsets": [0, 99]}},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_of_no_arrays_is_refused(case, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "set_int_max_str_digits", None, raising=False)
    header = HEADERS[case]
    if case == "shape of thousands":
        header = json.dumps(entry()).replace("[4]", f"[{'9' * 4000}]").encode()
    with pytest.raises(UserError) as error:
        SafetensorsFile(safetensors(tmp_path / "a.safetensors", header))
    assert len(str(error.value)) < 1_000 + len(str(tmp_path)) and "\n" not in str(error.value)


def test_a_header_without_end_is_not_read(tmp_path):
    """A sparse file of 6 GB, and a length of 2**60."""
    for length in (2**60, 2**63, 5 * 2**30, 200_000_000):
        path = safetensors(tmp_path / "a.safetensors", {}, length=length)
        os.truncate(path, 6 * 2**30)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(UserError, match="says that its header has"):
            SafetensorsFile(path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    path.unlink()


LEADING_OUT = ("../w.safetensors", "/dev/zero", "a/../../w.safetensors", "..", ".", "", "sub/w")


@pytest.mark.parametrize("name", [*LEADING_OUT, "x" * 300, "a\0b", 5, None, True, ["a"], {"a": 1}])
def test_an_index_names_files_of_its_folder(name, tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    safetensors(tmp_path / "w.safetensors", entry())
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError) as error:
        files.open_checkpoint(folder)
    assert len(str(error.value)) < 1_000


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, "9" * 10_000, '{"weight_map": 3}', "[]", "null", '{"weight_map": null}', ""],
)
def test_an_index_of_no_shards_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError):
        weight_files.shards_of(tmp_path / "model.safetensors.index.json")
    with pytest.raises(UserError):
        chatglm.read_config(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "a.safetensors", "w"])
def test_links_to_devices_are_not_read(name, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "w"}}))
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(UserError):
        files.open_checkpoint(tmp_path)


def test_a_state_dict_within_itself_ends(tmp_path):
    torch = pytest.importorskip("torch")
    circle: dict = {"n": 1}
    circle["model"] = circle
    nested: dict = {"n": 1}
    for _ in range(40):
        nested = dict.fromkeys(files.USUAL, nested)
    for number, content in enumerate((circle, nested)):
        torch.save(content, tmp_path / f"{number}.pth")
        assert len(files.TorchFile(tmp_path / f"{number}.pth")) == 0


def small(content):
    """An archive's module that holds a tensor and what a pickle makes of some bytes."""
    head, end = written(Module({"w": Tensor(0, (4, 4), (4, 1))}), {})[:-2], b"ub"
    return head + written("x", {}) + content + end


def rebuilt(entry, shape):
    """A tensor whose entry and shape are the bytes of a pickle."""
    storage = b"(" + written("storage", {}) + b"ctorch\nFloatStorage\n" + entry
    storage += written("cpu", {}) + written(16, {}) + b"tQ"
    strides = written((1,), {})
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0" + shape + strides + b"tR"


DOUBLED = b")" + b"2\x86" * 40  # a tuple of 2**40 parts, each level of which stands there once
LONG = b"(" + b"K\x01" * 1_000_000 + b"lr\xff\0\0\0"
AGAIN = b"j\xff\0\0\0"
SWELLING = {
    "a shape without end": rebuilt(written("0", {}), DOUBLED),
    "a name without end": rebuilt(DOUBLED, written((4,), {})),
    "copies of a list": b"("
    + LONG
    + (b"ctorch.jit._pickle\nbuild_intlist\n" + AGAIN + b"\x85R") * 300
    + b"l",
    "numbers of a nested list": b"ctorch\nDoubleStorage\n]" + b"2\x86" * 26 + b"\x85R",
}


@pytest.mark.parametrize("case", SWELLING)
def test_a_small_pickle_neither_swells_nor_hangs(case, tmp_path):
    path = tmp_path / "a.pt"
    head = b"\x80\x02" + small(SWELLING[case]) + b"."
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (("m/data.pkl", head), ("m/code/m.py", b""), ("m/data/0", bytes(64))):
            file.writestr(name, content)
    script = (
        "import resource, sys; from xllm_jax.convert.torchscript import TorchScriptFile\n"
        "from xllm_jax.core.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
        "try: print(dict(TorchScriptFile(sys.argv[1]))['w'].shape)\n"
        "except UserError: print('refused')\n"
        "print(next(s for s in open('/proc/self/status') if s.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    told, peak, *_ = done.stdout.splitlines()
    assert told in ("refused", "(4, 4)") and int(peak.split()[1]) < 400 << 10


def test_names_of_nested_modules_are_bounded(tmp_path):
    module = Module({f"t{n}": Tensor(0, (4, 4), (4, 1)) for n in range(5000)})
    for _ in range(30):
        module = Module({"n" * 1000: module})
    with pytest.raises(UserError, match="TorchScript"):
        TorchScriptFile(archive(tmp_path / "a.pt", module, FLOATS.tobytes()))


@pytest.mark.parametrize("shape", [[1] * 65 + [4], [2**63 - 1] * 300_000, [0, 2**63]])
def test_no_array_has_such_a_shape(shape, tmp_path):
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    begun = time.monotonic()
    with pytest.raises(UserError, match="shape"):
        SafetensorsFile(path)["w"]
    assert time.monotonic() - begun < 5
