"""How large a medium is, by its header: what a service looks at before it takes a file."""

from __future__ import annotations

import dataclasses

from PIL import Image, UnidentifiedImageError

from xllm_jax.core.errors import UserError
from xllm_jax.data.media import formats, image, image_work, paths, speech, video_container

TIMES_A_SECOND = 1_000_000  # FFmpeg's clock of a whole file


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a file says of itself; 0 where it says nothing.

    Attributes:
      pixels: of the picture, or of a frame.
      frames: of the clip.
      seconds: of the clip or the sound.
    """

    pixels: int = 0
    frames: int = 0
    seconds: float = 0.0


def of(modality: str, path: str) -> Facts:
    """Reads the header of one file; of modalities beyond the library's own nothing is known.

    Args:
      modality: 'image', 'video' or 'speech'.
      path: the file.

    Raises:
      UserError: it is of another kind, or its decoder fails in any way of its own.
    """
    look = {"image": _of_image, "video": _of_video, "speech": _of_sound}.get(modality)
    try:
        return look(path) if look else Facts()
    except UserError:
        raise
    except Exception as error:  # what foreign decoders raise on damaged files has no bounds
        what = f"its decoder failed ({type(error).__name__})"
        raise UserError(what, field=path, hint="Look at the file") from error


def _of_image(path: str) -> Facts:
    content = paths.whole(path, "image", image.MOST_BYTES)
    formats.check(path, "image", content.getbuffer()[: formats.HEAD].tobytes())
    image_work.check(path, content.getvalue())
    try:
        with Image.open(content, formats=formats.IMAGES) as picture:
            return Facts(picture.width * picture.height)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError("has too many pixels", field=path, hint="Shrink it") from None
    except UnidentifiedImageError:
        what = "cannot be read as an image (of no known format)"
        raise UserError(what, field=path, hint="Download it again") from None


def _of_video(path: str) -> Facts:
    with video_container.opened(path) as (container, stream):
        context = stream.codec_context
        pixels = (context.width or 0) * (context.height or 0)
        seconds = (container.duration or 0) / TIMES_A_SECOND
        frames = stream.frames or round(seconds * float(stream.average_rate or 0))
        return Facts(pixels, frames, seconds)


def _of_sound(path: str) -> Facts:
    frames = speech.count_frames(path)
    return Facts(seconds=(speech.WINDOW + (frames - 1) * speech.HOP) / speech.RATE if frames else 0)
