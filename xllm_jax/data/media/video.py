"""Video files to a fixed number of normalized frames (X-LLM's `rawvideo_util.py`).

Frames are spread evenly over the whole video; the repository's own rule, the first frames at one a
second, is the option 'reference'. A frame is resized by its short side and cropped to the center.
A path that ends in '#t=12.5,30' is read as those seconds of the video alone.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import formats, image, paths, video_packets
from xllm_jax.data.media.modality import Modality

REFERENCE_SECONDS = 60  # the repository reads at most this many seconds after the first frame
END_SECONDS = 2.0  # annotated clips may start so much behind the last frame
# Neither playlists, which name other files, nor text and single pictures, which are no videos.
ALLOWED = {"format_whitelist": formats.VIDEOS, "protocol_whitelist": "file"}
MOST_FRAMES = 200_000  # decoded at most; a damaged index cannot keep the reader busy forever


def load(
    path: str | Path, options: Mapping[str, Any], rng: np.random.Generator | None = None
) -> np.ndarray:
    """Reads the frames of one video.

    Args:
      path: the file.
      options: 'frames' wanted (5), 'size' in pixels (224), 'sampling': 'uniform' or 'reference'
        ('uniform'). Options of images that do not concern videos are ignored.
      rng: ignored; frames are the same in training and evaluation.

    Returns:
      `[frames, size, size, 3]` float32, normalized. A video with fewer frames than wanted repeats
      some of them in 'uniform' and ends with all-zero frames in 'reference'.

    Raises:
      UserError: the file is missing, not a video, damaged or without a frame; unknown sampling.
    """
    wanted, size = options.get("frames", 5), options.get("size", 224)
    sampling = options.get("sampling", "uniform")
    span = paths.place(path).span
    if span:
        pictures = decode_times(path, span_times(*span, wanted, sampling))
        return _stacked([image.normalize(center(one, size)) for one in pictures], wanted, size)
    indices, frames = _straight(path, wanted, sampling) or _through(path, wanted, sampling)
    pixels = {number: image.normalize(center(frame, size)) for number, frame in frames.items()}
    return _stacked([pixels[number] for number in indices], wanted, size)


def pictures(path: str | Path, wanted: int) -> list[Image.Image]:
    """So many frames spread over a video, as they are.

    Raises:
      UserError: as in `load`.
    """
    span = paths.place(path).span
    if span:
        return decode_times(path, span_times(*span, wanted))
    indices, frames = _straight(path, wanted, "uniform") or _through(path, wanted, "uniform")
    return [frames[number] for number in indices]


def _straight(
    path: str | Path, wanted: int, sampling: str
) -> tuple[list[int], dict[int, Image.Image]] | None:
    """Numbers and frames, decoding only what they refer to; None where packets do not tell."""
    with _opened(path) as container:
        stream = _stream(container, path)
        found = video_packets.collect(container.demux(stream))
        if not found:
            return None
        indices = choose(stream.frames or len(found), _rate(stream), wanted, sampling)
        if max(indices) >= len(found):
            return None
        frames = video_packets.pictures(stream.codec_context, found, indices)
    return (indices, frames) if len(frames) == len(set(indices)) else None


def _through(
    path: str | Path, wanted: int, sampling: str
) -> tuple[list[int], dict[int, Image.Image]]:
    """Numbers and frames, decoding everything up to the last.

    Raises:
      UserError: there are fewer frames than the decoder counted at first.
    """
    count, rate = describe(path)
    for _ in range(2):
        indices = choose(count, rate, wanted, sampling)
        frames, decoded = decode(path, indices)
        if len(frames) == len(set(indices)):
            return indices, frames
        count = decoded  # the header promised more frames than there are
    raise UserError("frames are missing", field=str(path), hint="Encode it again")


def _rate(stream: Any) -> float:
    """Frames per second, 0 where the file does not say."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def _stacked(chosen: list[np.ndarray], wanted: int, size: int) -> np.ndarray:
    """Frames, and all-zero ones behind them until there are as many as wanted."""
    return np.stack(chosen + [np.zeros((size, size, 3), np.float32)] * (wanted - len(chosen)))


def choose(count: int, rate: float, wanted: int, sampling: str = "uniform") -> list[int]:
    """Frame numbers to read, at most `wanted`.

    Args:
      count: frames of the video, at least 1.
      rate: frames per second.
      wanted: frames asked for.
      sampling: 'uniform' or 'reference'.

    Raises:
      UserError: unknown sampling.
    """
    if sampling == "uniform":
        return uniform_frames(count, wanted)
    if sampling == "reference":
        return reference_frames(count, rate)[:wanted]
    raise UserError(
        f"unknown sampling {sampling!r}", field="data.video.sampling", hint="uniform or reference"
    )


def uniform_frames(count: int, wanted: int) -> list[int]:
    """Centers of `wanted` equal parts of the video; numbers repeat when it has fewer frames."""
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]


def reference_frames(count: int, rate: float) -> list[int]:
    """One frame a second from the first on, the rate cut to whole frames, for 60 seconds."""
    step = max(int(rate), 1)
    return list(range(0, min(count, REFERENCE_SECONDS * step + 1), step))


def span_times(start: float, end: float, wanted: int, sampling: str = "uniform") -> list[float]:
    """Seconds of the frames to read from a span of a video, by the rules of `choose`.

    Raises:
      UserError: unknown sampling, or an end that is not behind the start.
    """
    choose(1, 1.0, wanted, sampling)  # refuses an unknown sampling
    length = end - start
    if length <= 0:
        raise UserError(f"a clip from {start} s to {end} s has no length")
    if sampling == "uniform":
        return [start + (2 * part + 1) * length / (2 * wanted) for part in range(wanted)]
    return [start + second for second in range(min(wanted, REFERENCE_SECONDS + 1, ceil(length)))]


def decode_times(path: str | Path, times: Sequence[float]) -> list[Image.Image]:
    """The pictures shown at some times, read from the key frame before the first one on.

    Args:
      path: the video.
      times: seconds from its start, in order.

    Raises:
      UserError: the file is damaged, has no frame, or ends before the first time.
    """
    return _straight_times(path, times) or _through_times(path, times)


def _straight_times(path: str | Path, times: Sequence[float]) -> list[Image.Image] | None:
    """The pictures, decoding only what they refer to; None where packets do not tell."""
    with _opened(path) as container:
        stream = _stream(container, path)
        origin = _seek(container, stream, times[0])

        def second(stamp: int) -> float:
            return float(stamp * stream.time_base) - origin

        # No frame is shown before it is decoded, so what is decoded later is shown later.
        found = video_packets.collect(
            itertools.takewhile(
                lambda packet: packet.dts is None or second(packet.dts) <= times[-1],
                container.demux(stream),
            )
        )
        if not found:
            return None
        shown = sorted(second(packet.pts) for packet in found)
        if times[0] > shown[-1]:  # perhaps beyond the end
            return None
        numbers = [max(bisect.bisect_right(shown, time) - 1, 0) for time in times]
        frames = video_packets.pictures(stream.codec_context, found, numbers)
    return [frames[n] for n in numbers] if len(frames) == len(set(numbers)) else None


def _seek(container: Any, stream: Any, time: float) -> float:
    """Goes to the key frame before a time; returns the second at which the stream starts."""
    origin = (stream.start_time or 0) * stream.time_base
    container.seek(int((time + origin) / stream.time_base), stream=stream)
    return float(origin)


def _through_times(path: str | Path, times: Sequence[float]) -> list[Image.Image]:
    """The pictures, decoding everything from the key frame before the first one on."""
    shown, before, now = [], None, 0.0
    with _opened(path) as container:
        stream = _stream(container, path)
        origin = _seek(container, stream, times[0])
        for _, frame in zip(range(MOST_FRAMES), container.decode(stream)):
            now = float(frame.time or 0) - origin
            while before is not None and len(shown) < len(times) and times[len(shown)] < now:
                shown.append(before.to_image())
            before = frame
            if len(shown) == len(times):
                break
        if before is None or times[0] > now + END_SECONDS:
            what = f"has no frame at {times[0]:.1f} s"
            raise UserError(what, field=str(path), hint="The clip lies beyond the video's end")
        shown += [before.to_image()] * (len(times) - len(shown))
    return shown


def describe(path: str | Path) -> tuple[int, float]:
    """Number of frames and frames per second, from the header or by counting packets.

    Raises:
      UserError: as in `load`.
    """
    with _opened(path) as container:
        stream = _stream(container, path)
        count, rate = stream.frames, _rate(stream)
        if not count:
            full = (packet for packet in container.demux(stream) if packet.size)
            count = sum(1 for _ in zip(range(MOST_FRAMES), full))
    if not count:
        raise UserError("has no frame", field=str(path), hint="Remove it from the data")
    return count, rate


def decode(path: str | Path, indices: Sequence[int]) -> tuple[dict[int, Image.Image], int]:
    """Decodes from the start to the last frame wanted.

    Returns:
      ({number: RGB frame}, frames decoded); numbers beyond the end are missing.

    Raises:
      UserError: the file is damaged or has no frame.
    """
    wanted, last = set(indices), min(max(indices), MOST_FRAMES)
    frames, decoded = {}, 0
    with _opened(path) as container:
        for frame in container.decode(_stream(container, path)):
            if decoded in wanted:
                frames[decoded] = frame.to_image()
            decoded += 1
            if decoded > last:
                break
    if not decoded:
        raise UserError("has no frame", field=str(path), hint="Remove it from the data")
    return frames, decoded


def center(picture: Image.Image, size: int) -> np.ndarray:
    """Short side to `size`, then the central square: `[size, size, 3]` uint8."""
    width, height = picture.size
    short = min(width, height)
    shape = (int(size * width / short), int(size * height / short))
    picture = picture.resize(shape, Image.Resampling.BICUBIC)
    left, top = round((shape[0] - size) / 2), round((shape[1] - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)).convert("RGB"))


class _opened:
    """An open container whose decoder errors become UserError."""

    def __init__(self, path: str | Path):
        self.path = path

    def __enter__(self) -> Any:
        import av
        from av.error import FFmpegError

        source = paths.source(self.path, "video", spans=True)
        self.errors = (FFmpegError, ValueError, EOFError)
        formats.check(self.path, "video")
        # Otherwise what stands before a colon in a file's name is taken for a protocol.
        source = f"file:{source}" if isinstance(source, str) else source
        try:
            self.container = av.open(source, container_options=ALLOWED)
        except self.errors as error:
            raise self._told(error) from error
        return self.container

    def __exit__(self, kind, error, trace) -> None:
        self.container.close()
        if isinstance(error, self.errors):
            raise self._told(error) from error

    def _told(self, error: Exception) -> UserError:
        what = f"cannot be read as a video ({error})"
        return UserError(what, field=str(self.path), hint="Download it again")


def _stream(container: Any, path: str | Path) -> Any:
    from av.stream import Disposition

    cover = Disposition.attached_pic
    moving = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not moving:
        raise UserError("has no video stream", field=str(path), hint="Remove it from the data")
    stream = moving[0]
    stream.codec_context.thread_count = 1  # files are read in parallel, not parts of one
    pixels = (stream.codec_context.width or 0) * (stream.codec_context.height or 0)
    if pixels > image.MOST_PIXELS:
        what = f"has frames of {pixels:,} pixels, more than {image.MOST_PIXELS:,}"
        raise UserError(what, field=str(path), hint="Shrink it")
    return stream


def _load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    return load(path, data.image | data.video, rng)


def _read(path: str) -> np.ndarray:
    return load(path, {"size": 32, "frames": 1})


def _shape(data: Data) -> tuple[int, ...]:
    size = (data.image | data.video).get("size", 224)
    return size, size, 3


def _items(data: Data) -> int:
    return (data.image | data.video).get("frames", 5)


MODALITY = Modality(
    load=_load,
    read=_read,
    shape=_shape,
    fields=("image", "video"),
    items=_items,
    tasks=("video_caption", "vqa"),
    view="frames",
)
