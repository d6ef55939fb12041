"""What is kept beside data is believed while it fits: checksums of shards, the index of a tar."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Source
from xllm_jax.data import mixture
from xllm_jax.data.media import paths
from xllm_jax.data.rows import verified
from xllm_jax.data.sources import webdataset
from xllm_jax.prepare import engine, manifest, preparation, shard


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A plan whose six records are written into three shards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(6):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = "".join(f"{number}.png,n{number}\n" for number in range(6))
    (tmp_path / "train.csv").write_text(f"filepath,title\n{rows}")
    source = Source("table", str(tmp_path))
    plan = preparation.make("six", source, str(tmp_path / "set"), 2, deadline=0.0)
    for number in range(3):
        shard.write(plan, number, plan.examples())
    manifest.finish(plan)
    return plan


def opened(plan):
    return mixture.read("six", Source("prepared", plan.output), "")


def flip(file, place=-40):
    content = bytearray(file.read_bytes())
    content[place] ^= 16
    times = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("place", [0, 100, -40, -1])
def test_a_flipped_bit_is_noticed(place, prepared):
    file = prepared.shards.file(1)
    flip(file, place)
    assert prepared.shards.finished(1)  # by its size
    with pytest.raises(UserError, match=r"00001-of-00003: has another checksum than manifest"):
        opened(prepared)


def test_a_missing_or_cut_shard_is_noticed(prepared):
    content = prepared.shards.file(1).read_bytes()
    prepared.shards.file(1).write_bytes(content[:-1])
    with pytest.raises(UserError, match="has not the"):
        opened(prepared)
    prepared.shards.file(1).unlink()
    with pytest.raises(UserError, match="cannot be read"):
        opened(prepared)


def test_a_set_is_compared_once_on_a_host(prepared, monkeypatch):
    read = []
    sha256 = verified.atomic.sha256
    monkeypatch.setattr(verified.atomic, "sha256", lambda file: read.append(file) or sha256(file))
    assert [one.answer for one in opened(prepared)] == [f"n{number}" for number in range(6)]
    assert len(read) == 3
    opened(prepared)
    assert len(read) == 3
    file = prepared.shards.file(2)
    flip(file, -1)
    flip(file, -1)  # the same content, written anew
    opened(prepared)
    assert len(read) == 6
    flip(file, -1)
    with pytest.raises(UserError, match="another checksum"):
        opened(prepared)
    with pytest.raises(UserError, match="another checksum"):  # a failure is not remembered
        opened(prepared)


def test_where_nothing_can_be_remembered_it_is_compared_each_time(prepared, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(opened(prepared)) == 6
    flip(prepared.shards.file(0))
    with pytest.raises(UserError, match="another checksum"):
        opened(prepared)


def test_preparing_compares_and_mends(prepared, monkeypatch):
    whole = {s: prepared.shards.file(s).read_bytes() for s in range(3)}
    flip(prepared.shards.file(1))
    asked = []

    def pipeline(*_):
        asked.extend(prepared.shards.todo())
        raise UserError("here Beam would write")

    monkeypatch.setattr(engine.runner, "pipeline", pipeline)
    with pytest.raises(UserError, match="here Beam would write"):
        engine.run(prepared)
    assert asked == [1]
    shard.write(prepared, 1, prepared.examples())
    assert {s: prepared.shards.file(s).read_bytes() for s in range(3)} == whole
    assert engine.run(prepared)["splits"]["train"]["records"] == 6  # nothing is left to write


def test_a_manifest_of_nothing_is_told(prepared):
    file = prepared.shards.folder / "manifest.json"
    about = json.loads(file.read_text())
    about["splits"]["train"]["shards"][0]["file"] = "../train.csv"
    for content in ("[" * 5000, "[]", '{"splits": 3}', json.dumps(about)):
        file.write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json"):
            opened(prepared)


@pytest.mark.parametrize(
    "change",
    [{"file": "a\0b"}, {"file": "\ud800"}, {"file": ".."}, {"file": "pipe", "bytes": 0}]
    + [{"bytes": "12"}, {"bytes": None}, {"bytes": [1]}, {"sha256": 5}],
)
def test_a_manifest_of_odd_values_is_told(change, prepared):
    """None is a traceback, and a pipe is not waited for."""
    folder = prepared.shards.file(0).parent
    os.mkfifo(folder / "pipe")
    about = json.loads((folder / "manifest.json").read_text())
    about["splits"]["train"]["shards"][1] |= change
    (folder / "manifest.json").write_text(json.dumps(about))
    script = (
        "import sys; from pathlib import Path; from xllm_jax.data.rows import verified\n"
        "from xllm_jax.core.errors import UserError\n"
        "try: verified.check(Path(sys.argv[1]), 'train')\n"
        "except UserError: print('refused')"
    )
    command = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "refused\n", done.stderr


def test_a_description_names_files_of_its_folder(prepared, tmp_path):
    """TFDS fills a template of the description in, which may lead anywhere."""
    assert len(opened(prepared)) == 6
    file = prepared.shards.folder / "dataset_info.json"
    about = json.loads(file.read_text())
    (split,) = about["splits"]
    place = tmp_path / "elsewhere"
    place.mkdir()
    for shard_file in prepared.shards.folder.glob("*.array_record*"):
        (place / shard_file.name).write_bytes(shard_file.read_bytes())
    split["filepathTemplate"] = f"../elsewhere/{split['filepathTemplate']}"
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match="names a file that lies outside of"):
        opened(prepared)


def picture(gray):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (gray, gray, gray)).save(stream, "PNG")
    return stream.getvalue()


def pack(path, count, first=0):
    with tarfile.open(path, "w") as archive:
        for number in range(count):
            for end, content in (
                ("png", picture(first + number)),
                ("txt", b"caption %03d" % (first + number)),
            ):
                member = tarfile.TarInfo(f"{number:05d}.{end}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def pairs(folder):
    found = webdataset.examples(str(folder))
    shades = [Image.open(io.BytesIO(paths.read(one.media[0][1]))).getpixel((0, 0)) for one in found]
    return [(one.answer, shade[0]) for one, shade in zip(found, shades)]


def swapped(rows):
    rows[:, :2] = rows[::-1, :2].copy()


def elsewhere(rows):
    rows[:, 0] -= 512


def beyond(rows):
    rows[:, 1] = 2**40


def negative(rows):
    rows[:, 0] = -5


def longer(rows):
    rows[:, 3] += 1


@pytest.mark.parametrize("forge", [swapped, elsewhere, beyond, negative, longer])
@pytest.mark.parametrize("stamped", [False, True])
def test_a_forged_index_is_not_believed(forge, stamped, tmp_path):
    """Also where its first row was made for it, by someone who has read this library."""
    from xllm_jax.data.rows import tar_index

    pack(tmp_path / "0.tar", 200)
    right = [(f"caption {number:03d}", number) for number in range(200)]
    assert pairs(tmp_path) == right
    file = tmp_path / ".index/0.npy"
    index = np.load(file)
    forge(index[1:])
    if stamped:
        index[0] = tar_index._stamp(tmp_path / "0.tar", index[1:])
    np.save(file, index)
    assert pairs(tmp_path) == right
    assert not np.array_equal(np.load(file), index)  # it was made anew


def test_an_older_index_is_made_anew(tmp_path):
    """It had the tar's size and time alone."""
    pack(tmp_path / "0.tar", 3)
    assert pairs(tmp_path)[2] == ("caption 002", 2)
    file, state = tmp_path / ".index/0.npy", (tmp_path / "0.tar").stat()
    index = np.load(file)
    index[0] = [state.st_size, state.st_mtime_ns, 0, 0, 0]
    swapped(index[1:])
    np.save(file, index)
    assert pairs(tmp_path)[2] == ("caption 002", 2)


def test_another_tar_of_the_same_size_and_time_has_its_own_index(tmp_path):
    pack(tmp_path / "0.tar", 20)
    before, state = pairs(tmp_path), (tmp_path / "0.tar").stat()
    pack(tmp_path / "0.tar", 20, first=100)
    os.utime(tmp_path / "0.tar", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (tmp_path / "0.tar").stat().st_size == state.st_size
    assert pairs(tmp_path) == [(f"caption {100 + n:03d}", 100 + n) for n in range(20)] != before


def test_an_index_is_used_where_it_fits(tmp_path, monkeypatch):
    pack(tmp_path / "0.tar", 20)
    before = pairs(tmp_path)
    monkeypatch.setattr(webdataset, "_scan", lambda tar: pytest.fail("read anew"))
    assert pairs(tmp_path) == before


def test_a_manifest_that_leaves_shards_out_is_told(prepared):
    """Whether of one shard, of all, or of the whole split."""
    file = prepared.shards.folder / "manifest.json"
    about = json.loads(file.read_text())
    shards = about["splits"]["train"]["shards"]
    for splits in ({"train": {"shards": shards[1:]}}, {"train": {"shards": []}}, {}):
        file.write_text(json.dumps({**about, "splits": splits}))
        with pytest.raises(UserError, match=r"manifest\.json"):
            opened(prepared)


@pytest.mark.parametrize("link", ["folder", "file", "older temporary name"])
def test_an_index_is_not_written_where_a_link_leads(link, tmp_path):
    root, outside = tmp_path / "set", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
    pack(root / "0.tar", 3)
    (outside / "0.npy").write_bytes(b"of somebody")
    if link == "folder":
        (root / ".index").symlink_to(outside)
    else:
        (root / ".index").mkdir()
        name = "0.npy" if link == "file" else f".0.{os.getpid()}.npy"
        (root / ".index" / name).symlink_to(outside / "0.npy")
    assert len(pairs(root)) == 3
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == {"0.npy": b"of somebody"}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("first", [True, False])
def test_a_tar_whose_header_is_hollow_is_not_read(kind, first, tmp_path):
    """Neither as the first one nor behind a whole sample."""
    file, at = tmp_path / "0.tar", 0
    pack(file, 1)
    if not first:
        with tarfile.open(file) as archive:
            last = archive.getmembers()[-1]
        at = last.offset_data + -(-last.size // 512) * 512
    member = tarfile.TarInfo("x")
    member.type, member.size = kind, 5 << 30
    with file.open("r+b") as opened_file:
        opened_file.seek(at)
        opened_file.write(member.tobuf(tarfile.GNU_FORMAT))
        opened_file.truncate(6 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"0\.tar"):
        webdataset.index(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
