"""Opening video files with PyAV: their first video stream, and going to a time in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import formats, matroska_elements, metadata_names, paths, video_tables

# Neither playlists, which name other files, nor text and single pictures, which are no videos.
ALLOWED = {"format_whitelist": formats.VIDEOS, "protocol_whitelist": "file"}
MOST_PIXELS = 4096 * 2304  # of a frame, many of which a decoder holds
EDGES = 1 << 20  # pixels beyond a frame that FFmpeg counts with it
# Codecs that can be decoded at a half, a quarter or an eighth of their sides.
REDUCING = ("mpeg4", "mpeg2video", "mpeg1video", "h263", "flv1", "mjpeg", "msmpeg4v2", "msmpeg4v3")


@contextmanager
def opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """(container, its first video stream), closed in the end.

    Raises:
      UserError: the file is missing, not a video, too large, or its decoder fails inside.
    """
    import av
    from av.error import FFmpegError

    source = paths.source(path, "video", spans=True)
    head = paths.read(path, formats.HEAD)
    formats.check(path, "video", head)
    video_tables.check(path, head)
    matroska_elements.check(path, head)
    metadata_names.check(path, head)
    # Otherwise what stands before a colon in a file's name is taken for a protocol.
    source = f"file:{source}" if isinstance(source, str) else source
    try:
        with av.open(source, container_options=ALLOWED) as container:
            yield container, _stream(container, path)
    except (FFmpegError, ValueError, EOFError) as error:
        what = f"cannot be read as a video ({formats.reason(error)})"
        raise UserError(what, field=str(path), hint="Download it again") from error


def _stream(container: Any, path: str | Path) -> Any:
    from av.stream import Disposition

    cover = Disposition.attached_pic
    moving = [stream for stream in container.streams.video if not stream.disposition & cover]
    if not moving:
        raise UserError("has no video stream", field=str(path), hint="Remove it from the data")
    stream = moving[0]
    context = stream.codec_context
    if context is None:
        raise UserError("has no codec that is known", field=str(path), hint="Convert it to H.264")
    context.thread_count = 1  # files are read in parallel, not parts of one
    pixels = (context.width or 0) * (context.height or 0)
    shares = range(4) if context.codec.canonical_name in REDUCING else range(1)
    share = next((n for n in shares if pixels >> 2 * n <= MOST_PIXELS), None)
    if share is None:
        what = f"has frames of {pixels:,} pixels, more than {MOST_PIXELS:,}"
        raise UserError(what, field=str(path), hint="Shrink it")
    # Frames within may be larger than the file says at first; the decoder refuses those.
    context.options = {"max_pixels": str((MOST_PIXELS << 2 * share) + EDGES)}
    if share:
        context.options = {**context.options, "lowres": str(share)}
    return stream


def seek(container: Any, stream: Any, time: Fraction) -> int | None:
    """Goes to the key frame before a time.

    Args:
      container, stream: of `opened`.
      time: seconds behind the first frame.

    Returns:
      The first frame's stamp in ticks of the stream; None where it is not known, or the file is of
      a form in which nobody can seek.
    """
    from av.error import FFmpegError

    first = next((packet for packet in container.demux(stream) if packet.size), None)
    if first is None or first.pts is None or first.is_discard:  # the edit list begins elsewhere
        return None
    try:
        container.seek(first.pts + int(time / stream.time_base), stream=stream)
    except (FFmpegError, OverflowError):  # nobody can seek in it, or it never lasts so long
        return None
    return first.pts
