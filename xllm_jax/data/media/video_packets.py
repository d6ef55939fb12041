"""Decoding no more of a video than a few frames need: from a key frame on, past what is unneeded.

A frame refers to frames before it, back to its key frame, and never to frames that are marked as
nobody's reference. So behind the key frame of a wanted frame only references are decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from PIL import Image

MOST_BYTES = 1 << 28  # packets held at once
# Codecs whose decoder leaves out frames without dependants, and gives all others unchanged.
SKIPPING = ("h264", "mpeg4")


def collect(packets: Iterable[Any]) -> list[Any] | None:
    """The packets of a stream if each is one frame with a time of its own, else None.

    None too for more than MOST_BYTES, and for a stream that does not start at a key frame.

    Args:
      packets: of PyAV's `demux`, in the order of decoding.
    """
    kept, size = [], 0
    for packet in packets:
        if packet.size:
            kept.append(packet)
            size += packet.size
            if packet.pts is None or packet.is_discard or size > MOST_BYTES:
                return None
    whole = kept and kept[0].is_keyframe and len({packet.pts for packet in kept}) == len(kept)
    return kept if whole else None


def spans(
    times: Sequence[int], keys: Sequence[int], wanted: Collection[int]
) -> list[tuple[int, int]]:
    """(first, last) packet of each stretch that must be decoded to see some frames.

    Args:
      times: presentation time of every packet, in the order of decoding.
      keys: packets that are key frames, ascending, 0 among them.
      wanted: packets whose frames are wanted.
    """
    found: dict[int, int] = {}
    for packet in sorted(wanted):
        # Frames decoded behind a key frame but shown before it belong to the one before.
        key = max((k for k in keys if k <= packet and times[k] <= times[packet]), default=0)
        found[key] = packet
    return sorted(found.items())


def pictures(
    context: Any, packets: Sequence[Any], numbers: Collection[int]
) -> dict[int, Image.Image]:
    """Frames by their number in the order of showing; those that the decoder kept are missing.

    Args:
      context: PyAV's codec context of the stream.
      packets: what `collect` gave.
      numbers: frames wanted, each below the number of packets.
    """
    times = [packet.pts for packet in packets]
    shown = sorted(range(len(packets)), key=times.__getitem__)
    wanted = {shown[number] for number in numbers}
    names = {times[shown[number]]: number for number in numbers}
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    found: dict[int, Image.Image] = {}
    for first, last in spans(times, keys, wanted):
        for frame in _decoded(context, packets[first : last + 1], {times[w] for w in wanted}):
            if frame.pts in names:
                found[names[frame.pts]] = frame.to_image()
    return found


def _decoded(context: Any, packets: Sequence[Any], wanted: Collection[int]) -> Iterable[Any]:
    """Frames of a stretch of packets; of SKIPPING codecs only wanted ones and references."""
    skipping = context.name in SKIPPING
    for packet in packets:
        if skipping:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from context.decode(packet)
    yield from context.decode(None)
    context.flush_buffers()
