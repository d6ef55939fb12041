"""Small or hollow checkpoints that would take all memory, or all time: refused within 1.5 GB."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

from xllm_jax.convert import bounds, files
from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError

MOST = 1500 << 10  # kB resident at most, as docs/security.md promises; PyTorch itself takes 220 MB
SECONDS = 200  # of CPU time, of all files together
SMALLER = 8  # times: budgets, and what may be taken for them, of most tests
READ = """
import resource, sys
from xllm_jax.convert import dry_run, files
from xllm_jax.core import bounded
from xllm_jax.core.errors import UserError
def peak(): return int(next(x.split()[1] for x in open('/proc/self/status') if 'VmHWM' in x))
seconds, smaller, usual, *paths = sys.argv[1:]
for module, name in (dry_run, 'MOST_WORK'), (bounded, 'MOST'), (bounded, 'MOST_SIGNS'):
    setattr(module, name, getattr(module, name) // int(smaller))
resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
files.open_checkpoint(usual)
before = peak()
for path in paths:
    try: print({name: array.shape for name, array in files.open_checkpoint(path).items()})
    except UserError as error: print('refused', ascii(str(error)))
print(before, peak())
"""


def refuses(*paths):
    """Another process with smaller budgets refuses each file, and takes as much less memory."""
    usual = paths[0].with_name("usual.bin")
    torch.save({"w": torch.ones(1)}, usual)
    given = (SECONDS, SMALLER, usual, *paths)
    command = [sys.executable, "-c", READ, *map(str, given)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    *told, peaks = done.stdout.splitlines()
    assert len(told) == len(paths)
    assert not [line for line in zip(paths, told) if not line[1].startswith("refused")]
    before, after = map(int, peaks.split())
    assert after - before < (MOST - before) / SMALLER


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    content = value.to_bytes(9, "little")
    return b"\x8a" + bytes([len(content)]) + content


def call(name: str, *given: bytes) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n(" + b"".join(given) + b"tR"


ENDLESS = b")" + b"2\x86" * 60  # a tuple of 2**60 tuples
MANY = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in range(20_000))
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x10tQ"
HUGE = number(2**40)
PICKLES = {
    "a key of tuples": b"}" + ENDLESS + b"Ns",
    "keys of tuples": b"}(" + ENDLESS + b"Nu",
    "a set of tuples": call("__builtin__ set", b"](" + ENDLESS + b"e"),
    "an ordered dict of tuples": call("collections OrderedDict", b"](](" + ENDLESS + b"Nee"),
    "a storage of tuples": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + ENDLESS
    + b"NK\x01tQ",
    "bytes of zeros": call("__builtin__ bytearray", number(2**33)),
    "bytes of zeros again": call("builtins bytearray", number(2**33)),
    "punycode": call(
        "_codecs encode",
        text("".join(map(chr, range(0x4E00, 0x4E00 + 20_000))) * 10),
        text("punycode"),
    ),
    "copies of a list": MANY + b"lq\x00](" + b"c__builtin__\nset\nh\x00\x85R" * 2000 + b"e",
    "copies of a dict": b"}q\x00"
    + MANY
    + b"u0]("
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 2000
    + b"e",
    "copies of a state": b"}q\x00"
    + MANY
    + b"u0]("
    + b"ccollections\nOrderedDict\n)Rh\x00b" * 2000
    + b"e",
    "empty lists": b"(" + b"]" * 1_250_000 + b"l",
    "empty dicts": b"](" + b"}" * 1_250_000 + b"e",
    "a new tensor": call("torch FloatTensor", HUGE),
    "a new storage": call("torch.storage UntypedStorage", HUGE),
    "a new object": b"ctorch\nFloatTensor\n" + HUGE + b"\x85\x81",
    "by a detour": call(
        "torch._tensor _rebuild_from_type_v2",
        b"ctorch\nFloatTensor\nctorch\nTensor\n" + HUGE + b"\x85N",
    ),
    "a quantized tensor": call(
        "torch._utils _rebuild_qtensor",
        STORAGE,
        b"K\x00",
        HUGE + b"\x85",
        b"K\x00\x85",
        b"(ctorch\nper_tensor_affine\nG?\xf0\0\0\0\0\0\0K\x00t",
        b"\x89N",
    ),
    "a storage beyond the file": b"("
    + text("storage")
    + b"ctorch\nFloatStorage\n"
    + text("0")
    + text("cpu")
    + HUGE
    + b"tQ",
}


def zipped(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        entries = {
            "data.pkl": content,
            "byteorder": b"little",
            "data/0": bytes(64),
            "version": b"3\n",
        }
        for name, entry in entries.items():
            archive.writestr(f"a/{name}", entry)
    return path


def legacy(path, content):
    head = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    path.write_bytes(head + content + b"\x80\x02].")
    return path


def test_a_pickle_that_swells_or_hangs_is_refused(tmp_path):
    shape = (b"K\x00", b"K\x04K\x04\x86", b"K\x04K\x01\x86", b"\x89", b"N")
    tensor = call("torch._utils _rebuild_tensor_v2", STORAGE, *shape)
    start = b"\x80\x02}(" + text("w") + tensor + text("x")
    made = [
        kind(tmp_path / f"{kind.__name__} {name}.bin", start + content + b"u.")
        for kind in (zipped, legacy)
        for name, content in PICKLES.items()
    ]
    # The keys of storages are a pickle, too.
    last = legacy(tmp_path / "keys.bin", b"\x80\x02}.")
    last.write_bytes(last.read_bytes()[:-4] + b"\x80\x02](" + ENDLESS + b"e.")
    # PyTorch looks below the first entry's folder.
    two = zipped(tmp_path / "two.bin", b"\x80\x02}.")
    with zipfile.ZipFile(two, "a") as archive:
        archive.writestr("b/data.pkl", b"\x80\x02}" + ENDLESS + b"Ns.")
    refuses(*made, last, two)


def hollow_zip(path, name, size):
    """A zip whose entry is a hole of so many bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/version", "3\n")
    tail_of = path.read_bytes()
    start = tail_of.index(b"PK\x01\x02")
    wide = struct.pack("<HHQQ", 1, 16, size, size)
    local = struct.pack(
        "<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, 2**32 - 1, 2**32 - 1, len(name), 20
    )
    central = struct.pack(
        "<4s6H3I5H2I",
        b"PK\1\2",
        45,
        45,
        0,
        0,
        0,
        0,
        0,
        2**32 - 1,
        2**32 - 1,
        len(name),
        20,
        0,
        0,
        0,
        0,
        start,
    )
    with path.open("wb") as file:
        file.write(tail_of[:start] + local + name + wide)
        file.seek(size, 1)
        at = file.tell()
        known = tail_of[start : tail_of.index(b"PK\x05\x06")] + central + name + wide
        file.write(known)
        end = file.tell()
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(known), at))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, 2**32 - 1, 2**32 - 1, 0))
    return path


def hollow(path, content, size=6 << 30):
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    return path


def tar_head(kind):
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 5 << 30
    return member.tobuf(tarfile.GNU_FORMAT)


def test_hollow_files_are_not_read(tmp_path):
    long = b"\x80\x02\x8d" + struct.pack("<Q", 5 << 30)
    shorter = b"\x80\x02X" + struct.pack("<I", 2**32 - 1)
    heads = (long, shorter, tar_head(tarfile.XHDTYPE), tar_head(tarfile.GNUTYPE_LONGNAME))
    made = [hollow(tmp_path / f"{n}.bin", head) for n, head in enumerate(heads)]
    refuses(hollow_zip(tmp_path / "zip.bin", b"a/data.pkl", 6 << 30), *made)


def test_headers_of_many_values_take_little_memory(tmp_path):
    entry = '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":[%s]}}'
    made = []
    for part in ("{}", "[]", '{"":0}', "1e5", '"\u00e9"'):
        count = (bounded.MOST // SMALLER - 200) // len(f"{part},".encode())
        content = (entry % ",".join([part] * count)).encode()
        made.append(tmp_path / f"{len(made)}.safetensors")
        made[-1].write_bytes(struct.pack("<Q", len(content)) + content + bytes(16))
    refuses(*made)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_hollow_configuration_is_not_read(name, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(4 << 30)
    with pytest.raises(UserError, match="bytes"):
        bounds.read_json(tmp_path / name)


@pytest.mark.parametrize("shape", [(2**40,), (2**15, 2**15), (3, 16)])
def test_a_tensor_has_no_more_elements_than_numbers(shape, tmp_path):
    """Its neighbors can be read all the same."""
    repeated = torch.zeros(1).expand(shape)
    path = tmp_path / "a.bin"
    torch.save({"repeated": repeated, "row": torch.arange(4.0).expand(1, 4)}, path)
    source = files.open_checkpoint(path)
    assert source["row"].tolist() == [[0, 1, 2, 3]]
    with pytest.raises(UserError, match=r"a\.bin: repeated"):
        source.header("repeated")
    with pytest.raises(UserError, match=r"a\.bin: repeated"):
        source["repeated"]


@pytest.mark.parametrize("old", [b"PK\x01\x02", b"a/version"])
def test_a_damaged_directory_of_an_archive_is_told_in_one_line(old, tmp_path):
    file = zipped(tmp_path / "a.bin", b"\x80\x02}.")
    content = bytearray(file.read_bytes())
    at = content.rindex(old)
    content[at : at + 2] = b"\xff\xfe"
    if old == b"a/version":
        flags = content.rindex(b"PK\x01\x02") + 8
        content[flags : flags + 2] = struct.pack("<H", 0x800)  # its name would be UTF-8
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a PyTorch file"):
        files.open_checkpoint(file)


def test_usual_files_stay_readable(tmp_path):
    """Nothing of what PyTorch writes by itself is taken for an attack."""
    model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(50)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    extra = {
        "bytes": b"\xff" * 50,
        "array": bytearray(b"abc"),
        "set": {1, 2},
        "args": [(1, (2, 3))],
    }
    for modern in (True, False):
        path = tmp_path / f"{modern}.bin"
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **extra}
        torch.save(content, path, _use_new_zipfile_serialization=modern)
        read = files.open_checkpoint(path)
        assert len(read) == 100
        assert json.dumps(read["7.weight"].tolist()) == json.dumps(model[7].weight.tolist())
