"""A Matroska clip whose tags, cues, attachments and their like take far more than its frames."""

from __future__ import annotations

import struct
import zlib

import measured_reading
import pytest
from test_video_tables import clip

SEGMENT, TRACKS, CLUSTER, CUES = "18538067", "1654ae6b", "1f43b675", "1c53bb6b"
INFO, TAGS, TAG, SIMPLE = "1549a966", "1254c367", "7373", "67c8"
ATTACHMENTS, CHAPTERS, EDITION, SEEK_HEAD = "1941a469", "1043a770", "45b9", "114d9b74"
KEPT = (INFO, TRACKS, CLUSTER)


def element(kind, content):
    return bytes.fromhex(kind) + struct.pack(">Q", len(content) | 1 << 56) + content


def number(content, at):
    """(value, place behind it) of a number of variable length."""
    length = 9 - content[at].bit_length()
    value = int.from_bytes(content[at : at + length]) & (1 << 7 * length) - 1
    return value, at + length


def parts(content):
    """(what stands before the segment, [(identity, content)] of its elements)."""
    size, at = number(content, 4)
    head = content[: at + size]
    _, at = number(content, at + size + 4)
    found = []
    while at < len(content):
        length = 9 - content[at].bit_length()
        size, inside = number(content, at + length)
        found.append((content[at : at + length].hex(), content[inside : inside + size]))
        at = inside + size
    return head, found


def tag(name, value="a"):
    fields = element("45a3", name.encode()) + element("4487", value.encode())
    return element(TAG, element(SIMPLE, fields))


def attached(size):
    fields = element("466e", b"a") + element("4660", b"b") + element("465c", bytes(size))
    return element("61a7", fields)


CUE = element("bb", element("b3", b"\1") + element("b7", b"\xf7\x81\1"))
PACKED = element("5034", element("4254", b"\0"))  # by zlib, the head of the track, too
PACKED = element("6d80", element("6240", element("5032", b"\3") + PACKED))
HEAVY = element("d7", b"\x20") + element("83", b"\x11") + element("86", b"S_TEXT/ASS") + PACKED
HEAVY = element("ae", HEAVY + element("63a2", zlib.compress(bytes(9_000_000), 9)))
REFUSED = {
    "packed tracks": element(TRACKS, HEAVY * 65),
    "packings": element(TRACKS, element("ae", element("6d80", b"\x62\x40\x80" * 400_000))),
    "tracks": element(TRACKS, b"\xae\x80" * 500_000),
    "cues": element(CUES, b"\xbb\x80" * 500_000),
    "attachments": element(ATTACHMENTS, b"\x61\xa7\x80" * 1_000_000),
    "an attachment": element(ATTACHMENTS, attached(100_000_000)),
    "chapters": element(CHAPTERS, element(EDITION, b"\xb6\x80" * 1_000_000)),
    "tags": element(TAGS, b"\x73\x73\x80" * 1_000_000),
    "names": element(TAGS, b"".join(tag(f"{number:06}") for number in range(20_000))),
    "lists of one": element(TAGS, tag("a")) * 600,
    "long ones": element(TAGS, tag("a" * 1000)) * 300,
    "places": element(SEEK_HEAD, b"\x4d\xbb\x80" * 1_000_000),
}
USUAL = {
    "cues": element(CUES, CUE * 9000),
    "an attachment": element(ATTACHMENTS, attached(1_000_000)),
    "tags": element(TAGS, b"".join(tag(f"NUMBER_{number}", "x" * 40) for number in range(400))),
}


@pytest.fixture(scope="module")
def taken(tmp_path_factory):
    """{name: what reading it took} of REFUSED, as they are and hidden, and of USUAL."""
    folder = tmp_path_factory.mktemp("matroska")
    head, found = parts(clip(folder / "whole.mkv", 90, "matroska"))
    kept = [element(kind, content) for kind, content in found if kind in KEPT]
    info, tracks, *clusters = kept

    def write(name, segment):
        (folder / f"{name}.mkv").write_bytes(head + element(SEGMENT, segment))

    write("usual.none", b"".join(kept))
    for name, content in REFUSED.items():
        write(f"refused.{name}", info + tracks + content + b"".join(clusters))
        write(f"behind.{name}", info + tracks + b"".join(clusters) + content)
        seek = len(element(SEEK_HEAD, element("4dbb", element("53ac", bytes(8)))))
        place = struct.pack(">Q", seek + 9)  # behind the head of what is passed over
        seeks = element(SEEK_HEAD, element("4dbb", element("53ac", place)))
        write(f"hidden.{name}", seeks + element("ec", content) + info + tracks + b"".join(clusters))
    for name, content in USUAL.items():
        write(f"usual.{name}", info + tracks + content + b"".join(clusters))
    # As a browser records: neither the segment nor a cluster says where it ends.
    endless = [bytes.fromhex(CLUSTER) + b"\xff" + c for kind, c in found if kind == CLUSTER]
    live = head + bytes.fromhex(SEGMENT) + b"\x01" + b"\xff" * 7 + info + tracks + b"".join(endless)
    (folder / "usual.live.mkv").write_bytes(live)
    (folder / "refused.live.mkv").write_bytes(live + REFUSED["tags"])
    (folder / "usual.cut.mkv").write_bytes((folder / "usual.none.mkv").read_bytes()[:-20])
    paths = sorted(folder.glob("*.*.mkv"))
    return measured_reading.read("video", paths)


def test_what_makes_long_lists_is_refused(taken):
    """Before: up to 40 bytes of memory for each byte; 20,000 tags were not read in 350 s."""
    found = {name: one for name, one in taken.items() if not name.startswith("usual")}
    assert len(found) == 3 * len(REFUSED) + 1
    for name, (megabytes, seconds, told) in found.items():
        assert "has more than" in told and "bytes of them" in told, (name, told)
        assert megabytes < 8 and seconds < 1, (name, megabytes, seconds)


def test_usual_ones_are_read(taken):
    found = {name: one for name, one in taken.items() if name.startswith("usual")}
    assert len(found) == len(USUAL) + 3
    for name, (megabytes, seconds, told) in found.items():
        assert told == "read", (name, told)
        assert megabytes < 16 and seconds < 1, (name, megabytes, seconds)
