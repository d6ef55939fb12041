"""Decoding no more of a video than a few frames need: from a key frame on, past what is unneeded.

A frame refers to frames before it, back to its key frame, and never to frames that are marked as
nobody's reference. So behind the key frame of a wanted frame only references are decoded. That
needs a file whose packets tell which frames it shows, and when.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from PIL import Image

from xllm_jax.data.media import display_matrix, video_times
from xllm_jax.data.media.video_times import Stamp

MOST_BYTES = 1 << 28  # packets held at once
# Codecs whose decoder leaves out frames without dependants, and gives all others unchanged.
SKIPPING = ("h264", "mpeg4")
# Codecs of which every packet is a frame that is shown, while VP8 hides some …
SURE = ("h264", "hevc", "av1", "vp9", "mpeg4")
# … and those of them with packets that only repeat the frame before, so the last one is looked at.
REPEATING = ("mpeg4",)


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


def codec(context: Any) -> str:
    """Name of a codec, whatever decodes it."""
    return context.codec.canonical_name


def sure(stream: Any, packets: Sequence[Any]) -> bool:
    """Whether the packets of a stream tell which frames it shows, and when.

    Args:
      stream: of PyAV.
      packets: what `collect` gave.
    """
    times = [packet.pts for packet in packets]
    # Where frames change places, but no stamp does, stamps are those of decoding (AVI).
    moved = stream.codec_context.has_b_frames and codec(stream.codec_context) != "av1"
    if moved and len(times) > 2 and video_times.ordered(times):
        return False
    ordered = sorted(times)
    gap = max((b - a for a, b in itertools.pairwise(ordered)), default=0) * stream.time_base
    return codec(stream.codec_context) in SURE and gap <= video_times.JUMP


def stamps(packets: Sequence[Any]) -> list[Stamp]:
    """Stamps of the frames in the order of showing."""
    ordered = sorted(packets, key=lambda packet: packet.pts)
    return [Stamp(packet.pts, None, packet.duration or 0) for packet in ordered]


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
    context: Any, packets: Sequence[Any], numbers: Collection[int], whole: bool = False
) -> dict[int, Image.Image]:
    """Upright frames by their number in the order of showing; those the decoder kept are missing.

    Args:
      context: PyAV's codec context of the stream.
      packets: what `collect` gave.
      numbers: frames wanted, each below the number of packets.
      whole: the last packet must be a frame, too, for it says when the video ends.
    """
    times = [packet.pts for packet in packets]
    shown = sorted(range(len(packets)), key=times.__getitem__)
    last = {len(packets) - 1} if whole and codec(context) in REPEATING else set()
    names = {times[shown[number]]: number for number in last.union(numbers)}
    wanted = {shown[number] for number in names.values()}
    keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
    found: dict[int, Image.Image] = {}
    for first, end in spans(times, keys, wanted):
        before = None
        for frame in _decoded(context, packets[first : end + 1], names):
            if frame.pts is None or (before is not None and frame.pts <= before):
                return {}
            before = frame.pts
            if before in names:
                found[names[before]] = display_matrix.picture(frame)
    return {number: found[number] for number in numbers if number in found and found.keys() >= last}


def _decoded(context: Any, packets: Sequence[Any], wanted: Collection[int]) -> Iterable[Any]:
    """Frames of a stretch of packets; of SKIPPING codecs only wanted ones and references."""
    skipping = codec(context) in SKIPPING
    for packet in packets:
        if skipping:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from context.decode(packet)
    yield from context.decode(None)
    context.flush_buffers()
