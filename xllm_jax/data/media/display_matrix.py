"""Frames of a video as they are shown: turned and mirrored by the display matrix of the file.

A phone films with its sensor as it lies and writes beside the frames how to hold them. The rules
are those of the program ffmpeg (`-autorotate`): quarter turns and mirrors move whole pixels, other
angles turn the picture within its frame.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    import av

Matrix = tuple[int, ...]  # nine numbers by rows: (x, y) goes to (m0 x + m3 y, m1 x + m4 y)


def picture(frame: av.VideoFrame) -> Image.Image:
    """A decoded frame of PyAV as RGB, upright."""
    matrix = _matrix(frame)
    shown = frame.to_image()
    return upright(shown, matrix) if matrix else shown


def _matrix(frame: Any) -> Matrix | None:
    from av.sidedata.sidedata import Type

    found = frame.side_data.get(Type.DISPLAYMATRIX)
    return struct.unpack_from("=9i", bytes(found)) if found and len(bytes(found)) >= 36 else None


def upright(shown: Image.Image, matrix: Matrix) -> Image.Image:
    """A picture as a display matrix wants it shown; itself where the matrix says nothing.

    Args:
      shown: as it is coded.
      matrix: of the frame.
    """
    angle = _clockwise(matrix)
    if abs(angle - 90) < 1:
        mirrored = matrix[3] > 0
        turn = Image.Transpose.TRANSPOSE if mirrored else Image.Transpose.ROTATE_270
        return shown.transpose(turn)
    if abs(angle - 270) < 1:
        mirrored = matrix[3] < 0
        turn = Image.Transpose.TRANSVERSE if mirrored else Image.Transpose.ROTATE_90
        return shown.transpose(turn)
    if abs(angle - 180) < 1:
        shown = shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if matrix[0] < 0 else shown
        return shown.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if matrix[4] < 0 else shown
    if abs(angle) > 1:
        return shown.rotate(-angle, Image.Resampling.BILINEAR)
    return shown.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if matrix[4] < 0 else shown


def _clockwise(matrix: Matrix) -> float:
    """Degrees by which a matrix turns clockwise, -0.9 to 359.1; 0 for one that turns nothing."""
    across, down = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if not across or not down:
        return 0.0
    angle = float(round(math.degrees(math.atan2(matrix[1] / down, matrix[0] / across))))
    return angle - 360 * math.floor(angle / 360 + 0.9 / 360)
