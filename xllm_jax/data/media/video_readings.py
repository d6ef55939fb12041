"""Pictures of a video by the frames that it shows: decoding as little as rightness allows.

packets     the stamps of a file's packets tell when each frame is shown, and only what the
            wanted frames refer to is decoded
frames      where packets do not tell: everything is decoded, first for the times alone
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import display_matrix, video_container, video_packets, video_times
from xllm_jax.data.media.video_times import Stamp, Timeline

MOST_FRAMES = 200_000  # decoded at most; a damaged index cannot keep the reader busy forever
USUAL = Fraction(1, 25)  # seconds of a frame where a file does not say
RESTARTS = 0x0200  # FFmpeg's flag of formats in which another recording may follow (TS_DISCONT)

Pick = Callable[[Timeline], list[int]]  # numbers of the frames wanted of a timeline, ascending


def pictures(path: str | Path, pick: Pick, times: Sequence[Fraction] = ()) -> list[Image.Image]:
    """Upright RGB pictures, one for each number that is picked.

    Args:
      path: the video.
      pick: chooses among the frames.
      times: seconds behind the first frame, in order, for a span of the video; its timeline may
        begin at any key frame before the first time and end anywhere behind the last.

    Raises:
      UserError: the file is damaged or has no frame; what `pick` raises.
    """
    found = by_packets(path, pick, times)
    if found is None and times:
        found = by_frames(path, pick, times)
    if found is None:
        found = by_frames(path, pick)
    if found is None:
        raise UserError("frames are missing", field=str(path), hint="Encode it again")
    return found


def by_packets(
    path: str | Path, pick: Pick, times: Sequence[Fraction] = ()
) -> list[Image.Image] | None:
    """The pictures of `pictures`; None where packets do not tell."""
    with video_container.opened(path) as (container, stream):
        origin = video_container.seek(container, stream, times[0]) if times else None
        if times and origin is None:
            return None
        packets = container.demux(stream)
        if origin is not None:
            packets = itertools.takewhile(_until(times[-1], origin, stream.time_base), packets)
        found = video_packets.collect(packets)
        if not found or not video_packets.sure(stream, found):
            return None
        shown = _timeline(container, stream, video_packets.stamps(found), origin)
        start = shown.stamp(times[0]) if times else shown.stamps[0]
        if found[0].pts > start or (times and times[0] > shown.last):
            return None
        numbers = pick(shown)
        frames = video_packets.pictures(stream.codec_context, found, numbers, whole=not times)
    return _chosen(frames, numbers)


def by_frames(
    path: str | Path, pick: Pick, times: Sequence[Fraction] = ()
) -> list[Image.Image] | None:
    """The pictures of `pictures`; None where a part of the video does not tell its times."""
    with video_container.opened(path) as (container, stream):
        origin = video_container.seek(container, stream, times[0]) if times else None
        if times and origin is None:
            return None
        found = _stamps(container.decode(stream), times, origin, stream.time_base)
        if origin is None and not found:
            raise UserError("has no frame", field=str(path), hint="Remove it from the data")
        if origin is not None and not (found and video_times.ordered([x.shown for x in found])):
            return None
        shown = _timeline(container, stream, found, origin)
    if times and origin is not None and not _begins(shown, times):
        return None
    numbers = pick(shown)
    return _chosen(_numbered(path, numbers, times), numbers)


def _until(time: Fraction, origin: int, tick: Fraction) -> Callable[[Any], bool]:
    """Whether a packet may hold something that is shown up to a time.

    No frame is shown before it is decoded, so what is decoded later is shown later.
    """
    return lambda packet: packet.dts is None or (packet.dts - origin) * tick <= time


def _stamps(
    frames: Iterator[Any], times: Sequence[Fraction], origin: int | None, tick: Fraction
) -> list[Stamp]:
    """Stamps of decoded frames, up to the first behind the last time of a span."""
    found = []
    for frame in itertools.islice(frames, MOST_FRAMES):
        found.append(Stamp(frame.pts, frame.dts, frame.duration))
        if frame.pts is None or origin is None:
            continue
        if (frame.pts - origin) * tick > times[-1]:
            break
    return found


def _timeline(container: Any, stream: Any, found: Sequence[Stamp], origin: int | None) -> Timeline:
    rate = float(stream.average_rate or stream.guessed_rate or 0)
    usual = 1 / Fraction(rate) if rate else USUAL
    restarts = origin is None and bool(container.format.flags & RESTARTS)
    shown = video_times.timeline(found, stream.time_base, usual, restarts)
    origin = shown.origin if origin is None else origin
    return dataclasses.replace(shown, origin=origin, rate=rate)


def _begins(shown: Timeline, times: Sequence[Fraction]) -> bool:
    """Whether a part of a video begins before the first time; seeking may end behind it."""
    return shown.stamps[0] <= shown.stamp(times[0])


def _numbered(
    path: str | Path, numbers: Sequence[int], times: Sequence[Fraction]
) -> dict[int, Image.Image]:
    """Frames by their number, from the place where their counting began."""
    found, wanted = {}, set(numbers)
    with video_container.opened(path) as (container, stream):
        if times:
            video_container.seek(container, stream, times[0])
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found[number] = display_matrix.picture(frame)
            if len(found) == len(wanted):
                break
    return found


def _chosen(frames: Mapping[int, Image.Image], numbers: Sequence[int]) -> list[Image.Image] | None:
    return [frames[n] for n in numbers] if frames.keys() >= set(numbers) else None
