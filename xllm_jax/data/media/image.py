"""Image files to normalized arrays, as BLIP-2's processors make them (`blip_processors.py`).

Training crops a random box and may mirror it; evaluation squashes the whole image into a square, as
SigLIP's processor does, too; CLIP, whose mean and deviation these are by default, wants the central
square. Pillow's filters with antialiasing do the resizing in all of them. A picture is held as its
EXIF orientation says, by the option `orientation`; the reference ignores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from xllm_jax.core.errors import UserError
from xllm_jax.core.stage import Data
from xllm_jax.data.media import formats, image_work, paths
from xllm_jax.data.media.modality import Modality

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
NORMALIZATIONS = {"clip": (MEAN, STD), "siglip": (HALF, HALF)}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MOST_PIXELS = 100_000_000
BUDGET = 1 << 29  # bytes that decoding one image may take
MOST_BYTES = 1 << 28  # of a file
ASPECTS = (3 / 4, 4 / 3)
ORIENTATIONS = ("exif", "ignore")
TURNS = {  # EXIF's numbers
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load(
    path: str | Path, options: Mapping[str, Any], rng: np.random.Generator | None = None
) -> np.ndarray:
    """Reads one image file.

    Args:
      path: the file.
      options: 'size' in pixels (224); for training 'scale', the range of the share of the area that
        a random crop keeps, None for no crop (None), and 'flip', mirror every second image (False);
        'orientation': 'exif' or 'ignore' ('exif'); 'normalization': a row of NORMALIZATIONS
        ('clip'); 'resample': a row of FILTERS ('bicubic').
      rng: randomness of training; None prepares the image as in evaluation.

    Returns:
      `[size, size, 3]` float32, normalized.

    Raises:
      UserError: the file is missing, not an image, damaged or too large; an unknown choice.
    """
    size, picture = options.get("size", 224), read(path, orientation=orientation(options))
    kind, by = normalization(options), resampling(options)
    if rng is None:
        return normalize(resize(picture, size, by), kind)
    scale = options.get("scale")
    box = crop_box(picture.height, picture.width, scale, rng) if scale else None
    flip = bool(options.get("flip", False)) and rng.random() < 0.5
    return normalize(augment(picture, size, box, flip, by), kind)


def orientation(options: Mapping[str, Any]) -> str:
    """The option 'orientation', which is 'exif' where nothing is said.

    Raises:
      UserError: unknown.
    """
    return _choice(options, "orientation", ORIENTATIONS)


def normalization(options: Mapping[str, Any]) -> str:
    """The option 'normalization', which is 'clip' where nothing is said.

    Raises:
      UserError: unknown.
    """
    return _choice(options, "normalization", tuple(NORMALIZATIONS))


def resampling(options: Mapping[str, Any]) -> Image.Resampling:
    """The filter that the option 'resample' names, the bicubic one where nothing is said.

    Raises:
      UserError: unknown.
    """
    return FILTERS[_choice(options, "resample", tuple(FILTERS))]


def _choice(options: Mapping[str, Any], name: str, choices: tuple[str, ...]) -> str:
    """An option that is one of some words, the first of them where nothing is said."""
    chosen = options.get(name, choices[0])
    if chosen not in choices:
        what = f"unknown {name} {chosen!r}"
        raise UserError(what, field=f"data.image.{name}", hint=" or ".join(choices))
    return chosen


def read(
    path: str | Path, most_pixels: int = MOST_PIXELS, orientation: str = "exif"
) -> Image.Image:
    """Opens a file as 8-bit RGB; of several pictures in it the first is read.

    An alpha channel is dropped. JPEG files above the limits are decoded at a half, a quarter or
    an eighth of their sides. Images of 16 bits a channel are scaled to 8 (Pillow alone would
    saturate them).

    Args:
      path: the file.
      most_pixels: that it may have.
      orientation: 'exif' turns and mirrors the picture as its EXIF says; 'ignore' leaves it as its
        pixels lie, which the reference does. TIFF is always turned, for Pillow itself does it.

    Raises:
      UserError: the file is missing, not an image, damaged, larger than `most_pixels`, or would
        take more memory than BUDGET.
    """
    try:
        content = paths.whole(path, "image", MOST_BYTES)
        formats.check(path, "image", content.getbuffer()[: formats.HEAD].tobytes())
        image_work.check(path, content.getvalue())
        with Image.open(content, formats=formats.IMAGES) as picture:
            _check_size(picture, most_pixels, path, image_work.buffered(content.getvalue()))
            picture.load()
            turn = TURNS.get(_exif_orientation(picture)) if orientation == "exif" else None
            found = _to_rgb(picture)
            return found if turn is None else found.transpose(turn)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError("has too many pixels", field=str(path), hint="Shrink it") from error
    except UnidentifiedImageError as error:
        what = "cannot be read as an image (of no known format)"
        raise UserError(what, field=str(path), hint="Download it again") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise
        raise UserError(
            f"cannot be read as an image ({formats.reason(error)})",
            field=str(path),
            hint="Download it again",
        ) from error


def _exif_orientation(picture: Image.Image) -> int:
    """EXIF's number, 1 where there is none or nobody can read it."""
    try:
        raw = picture.info.get("exif") or bytes.fromhex(
            "".join(picture.info.get("Raw profile type exif", "").split("\n")[3:])
        )
        if image_work.crowded(raw):
            return 1
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # what damaged tags raise has no bounds, and the picture is there
        return 1


def _check_size(picture: Image.Image, most_pixels: int, path: str | Path, buffered: bool) -> None:
    """Looks at an opened image before it is decoded; a JPEG that is too large is made smaller.

    Args:
      picture: just opened.
      most_pixels: that it may have.
      path: for the message.
      buffered: its decoder keeps coefficients until the last scan has come.

    Raises:
      UserError: too many pixels, or too much memory for them.
    """
    width, height = picture.size
    # Coefficients are kept at full size, two bytes for each channel.
    kept = 2 * len(picture.getbands()) * width * height if buffered else 0
    for share in (1, 2, 4, 8):
        if share > 1:
            picture.draft(None, (width // share, height // share))
        pixels = picture.width * picture.height
        wanted = kept + pixels * _pixel_bytes(picture)
        if pixels <= most_pixels and wanted <= BUDGET:
            return
        if picture.format not in ("JPEG", "MPO"):
            break
    what = f"has {width} x {height} pixels, more than {most_pixels:,}"
    if pixels <= most_pixels:
        what = f"would take {wanted:,} bytes to decode, more than {BUDGET:,}"
    raise UserError(what, field=str(path), hint="Shrink it")


def _pixel_bytes(picture: Image.Image) -> int:
    """Bytes that a decoded pixel takes on its way to RGB, as measured."""
    if picture.format == "WEBP":
        return 16  # libwebp keeps the canvas of an animation several times
    return {"RGB": 4, "1": 5, "L": 5, "P": 5}.get(picture.mode, 8 if len(picture.mode) > 2 else 12)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        gray = np.asarray(picture) >> 8
        return Image.fromarray(np.clip(gray, 0, 255).astype(np.uint8)).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def resize(
    picture: Image.Image, size: int, by: Image.Resampling = Image.Resampling.BICUBIC
) -> np.ndarray:
    """The whole image squashed to `[size, size, 3]` uint8."""
    return np.asarray(picture.resize((size, size), by))


def center(picture: Image.Image, size: int) -> np.ndarray:
    """Short side to `size`, then the central square, `[size, size, 3]` uint8: CLIP's preparation.

    As `CLIPImageProcessor` of transformers cuts it. torchvision, and with it `video.center`, starts
    one pixel later where the margin is three more than a multiple of four.
    """
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def square(path: str | Path, side: int) -> np.ndarray:
    """A file as CLIP sees it, `[side, side, 3]` float32.

    Raises:
      UserError: as `read`.
    """
    return normalize(center(read(path), side))


def augment(
    picture: Image.Image,
    size: int,
    box: tuple[int, int, int, int] | None,
    flip: bool,
    by: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """A crop, resized and perhaps mirrored, `[size, size, 3]` uint8.

    Args:
      picture: RGB.
      size: side in pixels.
      box: (top, left, height, width) of the crop; None keeps the whole image.
      flip: mirror left and right after the crop.
      by: filter of the resizing.
    """
    if box is not None:
        top, left, height, width = box
        picture = picture.crop((left, top, left + width, top + height))
    picture = picture.resize((size, size), by)
    return np.asarray(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture)


def crop_box(
    height: int,
    width: int,
    scale: tuple[float, float],
    rng: np.random.Generator,
    aspects: tuple[float, float] = ASPECTS,
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop, by torchvision's rules.

    Ten draws of an area (uniform share) and an aspect ratio (uniform logarithm); when none fits,
    the largest central box whose aspect is allowed.

    Returns:
      (top, left, height, width).
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(aspects[0]), math.log(aspects[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
            return int(top), int(left), h, w
    aspect = min(max(width / height, aspects[0]), aspects[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (height - h) // 2, (width - w) // 2, h, w


def normalize(pixels: np.ndarray, kind: str = "clip") -> np.ndarray:
    """`[..., 3]` uint8 to float32.

    Args:
      pixels: of any number of images.
      kind: whose mean and standard deviation, a row of NORMALIZATIONS; BLIP-2 has CLIP's.
    """
    mean, deviation = NORMALIZATIONS[kind]
    width = pixels.shape[-2]
    # Over whole lines: NumPy is five times slower where it repeats three numbers for every pixel.
    lines = pixels.reshape(*pixels.shape[:-2], 3 * width).astype(np.float32)
    lines /= np.float32(255)
    lines -= np.tile(np.asarray(mean, np.float32), width)
    lines /= np.tile(np.asarray(deviation, np.float32), width)
    return lines.reshape(pixels.shape)


def to_signed(pixels: np.ndarray) -> np.ndarray:
    """`[..., 3]` uint8 to float32 from -1 to 1, as autoencoders of latent diffusion read it."""
    return pixels.astype(np.float32) / np.float32(127.5) - 1


def from_signed(values: np.ndarray) -> np.ndarray:
    """The inverse of `to_signed`, rounded; what lies outside of -1 to 1 is clipped."""
    return np.rint(np.clip(values / 2 + 0.5, 0, 1) * 255).astype(np.uint8)


def _load(path: str, data: Data, rng: np.random.Generator | None) -> np.ndarray:
    return load(path, data.image, rng)[None]


def _shape(data: Data) -> tuple[int, ...]:
    size = data.image.get("size", 224)
    return size, size, 3


def _settings(data: Data) -> dict[str, str]:
    return {"data.image.orientation": orientation(data.image)}


def _random(data: Data) -> tuple[str, ...]:
    return tuple(f"data.image.{name}" for name in ("scale", "flip") if data.image.get(name))


MODALITY = Modality(
    load=_load,
    read=read,
    shape=_shape,
    fields=("image",),
    settings=_settings,
    libraries=("Pillow",),
    random=_random,
    tasks=("caption", "vqa"),
    view="picture",
    picture=True,
)
