"""What a picture of the embedded world shows, read by hue and outline: the judge of drawings.

Nothing here is learnt. Pixels that stand out from the background are of the color whose direction
from the background they lie in; what hangs together in one color is compared with the outlines that
the world draws, at every radius and turn; the nearest outline says shape, size and center.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import scipy.ndimage
from PIL import Image, ImageDraw

from xllm_jax.core.errors import UserError
from xllm_jax.data.synthetic_world import render
from xllm_jax.data.synthetic_world.requests import RELATIONS, Request, Wanted
from xllm_jax.data.synthetic_world.scene import COLORS, PLACES, SHAPES, Object

SIDE = 96  # pixels that pictures are read at
HALF = 22  # of a window around an object
REACH = 3  # pixels that an outline may lie beside the middle of what was found
SMALLEST = 40  # pixels of an object; the smallest star of the world has 83
WIDEST = 0.38 * SIDE  # what is wider is more than one object
MIDDLE = (render.RADIUS["大"] + render.RADIUS["小"]) / 2
RADII = tuple(0.06 * 1.05**n for n in range(22))  # shares of the side, to 0.167
TURNS = (-0.14, -0.07, 0.0, 0.07, 0.14)
MISFIT = 0.30  # share of an outline's area that may differ; more is no object of the world
APART = 1 / 12  # share of the side that one object stands beside another at least


@dataclasses.dataclass(frozen=True)
class Seen:
    """An object that a picture shows.

    Attributes:
      item: in the words of the world.
      x, y, radius: shares of the side.
      misfit: what differs from the outline, as a share of its area.
    """

    item: Object
    x: float
    y: float
    radius: float
    misfit: float


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which of the asked things hold; None for what was not asked.

    Attributes:
      count: as many objects as asked, whatever they are.
      shapes, colors: those that were asked, each as often.
      looks: shape and color of every object, each as often, and nothing else.
      sizes, places: of every object for which one was asked.
      relation: the first object stands so beside the second.
    """

    count: bool
    shapes: bool
    colors: bool
    looks: bool
    sizes: bool | None
    places: bool | None
    relation: bool | None

    @property
    def all(self) -> bool:
        """Whether everything that was asked holds."""
        return all(value is not False for value in dataclasses.asdict(self).values())


def judge(request: Request, picture: np.ndarray) -> Verdict:
    """Compares a picture, `[height, width, 3]` uint8, with what was asked for."""
    return compare(request.objects, read(picture), request.relation)


def compare(wanted: Sequence[Wanted], seen: Sequence[Seen], relation: str = "") -> Verdict:
    """Compares objects that were read with what was asked for.

    Args:
      wanted: all objects that the picture shall show, and no others.
      seen: what it shows.
      relation: where the first of them stands, seen from the second: a key of RELATIONS, or ''.

    Raises:
      UserError: an unknown relation.
    """
    if relation and relation not in RELATIONS:
        hint = f"Known: {', '.join(RELATIONS)}"
        raise UserError(f"unknown relation {relation!r}", field="relation", hint=hint)
    items = [one.item for one in seen]

    def same(*names: str) -> bool:
        said = [one for one in wanted if all(getattr(one, name) for name in names)]
        asked = Counter(tuple(getattr(one, name) for name in names) for one in said)
        found = Counter(tuple(getattr(one, name) for name in names) for one in items)
        # Objects of which something is unsaid may be anything in this; the others must be there.
        return asked == found if len(said) == len(wanted) else not asked - found

    def said(name: str) -> bool:
        return any(getattr(one, name) for one in wanted)

    return Verdict(
        count=len(items) == len(wanted),
        shapes=same("shape"),
        colors=same("color"),
        looks=same("shape", "color"),
        sizes=same("shape", "color", "size") if said("size") else None,
        places=same("shape", "color", "place") if said("place") else None,
        relation=_stands(wanted, seen, relation) if relation else None,
    )


def _stands(wanted: Sequence[Wanted], seen: Sequence[Seen], relation: str) -> bool:
    """Whether any object like the first stands beside any like the second as was asked."""
    first, second = (
        [one for one in seen if one.item.pair == (asked.shape, asked.color)] for asked in wanted[:2]
    )
    across, down = RELATIONS[relation]
    for one in first:
        for other in second:
            x, y = one.x - other.x, one.y - other.y
            along, aside = (across * x, y) if across else (down * y, x)
            if one is not other and along > APART and along > abs(aside):
                return True
    return False


def read(picture: np.ndarray) -> tuple[Seen, ...]:
    """The objects of a picture in reading order.

    Args:
      picture: `[height, width, 3]` uint8 of any size; read at 96 x 96.

    Raises:
      UserError: no picture of bytes.
    """
    picture = np.asarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        what = f"is {picture.dtype} {picture.shape}, and a picture is uint8 [height, width, 3]"
        raise UserError(what, field="picture", hint="Round pixels to 0..255")
    if picture.shape[:2] != (SIDE, SIDE):
        sized = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        picture = np.asarray(sized)
    pixels = picture.astype(np.float32)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    away = pixels - ground
    kinds = _colors(away, ground)
    found = [seen for color in range(len(COLORS)) for seen in _of_color(away, kinds, color)]
    return tuple(sorted(found, key=lambda one: PLACES.index(one.item.place)))


def _colors(away: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """The color of each pixel, `[SIDE, SIDE]` int: its number, -1 where it is background."""
    ways = np.array([render.RGB[color] for color in COLORS], np.float32) - ground
    lengths = np.linalg.norm(ways, axis=1)
    along = away @ (ways / lengths[:, None]).T
    near = np.argmax(along / (np.linalg.norm(away, axis=-1, keepdims=True) + 1e-6), axis=-1)
    share = np.take_along_axis(along / lengths, near[..., None], -1)[..., 0]
    return np.where(share > 0.5, near, -1)


def _of_color(away: np.ndarray, kinds: np.ndarray, color: int) -> Iterator[Seen]:
    """The objects of one color."""
    labels, count = scipy.ndimage.label(kinds == color)
    for number in range(1, count + 1):
        part = labels == number
        if part.sum() < SMALLEST:
            continue
        rows, columns = np.nonzero(part)
        wide = max(np.ptp(rows), np.ptp(columns)) + 1 > WIDEST
        whole = None if wide else _fitted(away, kinds, color, part)
        pieces = [whole] if whole else _divided(away, kinds, color, part)
        yield from (one for one in pieces if one and one.misfit < MISFIT)


def _divided(
    away: np.ndarray, kinds: np.ndarray, color: int, part: np.ndarray
) -> Iterable[Seen | None]:
    """Objects of one color that touch each other: one in every cell of the grid that is filled."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE] * 3 // SIDE
    for cell in range(len(PLACES)):
        own = part & (3 * rows + columns == cell)
        if own.sum() >= SMALLEST:
            yield _fitted(away, kinds, color, own, whole=part)


def _fitted(
    away: np.ndarray,
    kinds: np.ndarray,
    color: int,
    part: np.ndarray,
    whole: np.ndarray | None = None,
) -> Seen | None:
    """The outline nearest to a part of the picture; None where none is near and it stands alone.

    Args:
      away: pixels from the background, `[SIDE, SIDE, 3]` float32.
      kinds: of `_colors`.
      color: its number.
      part: bool, pixels of the object.
      whole: bool, what hangs together with it.
    """
    core = part & scipy.ndimage.binary_erosion(part, iterations=2)
    way = np.median(away[core if core.sum() > 8 else part], axis=0)
    alpha = np.clip(away @ way / (way @ way), 0, 1)
    # Other objects may hide a part of this one: what lies there is unknown.
    known = (kinds == color) | (kinds < 0)
    others = (kinds == color) & ~(part if whole is None else whole)
    rows, columns = np.nonzero(part)
    row, column = (round((values.min() + values.max()) / 2) for values in (rows, columns))
    if whole is not None:
        # A neighbor of the same color fills what lies beyond the cell.
        low = np.array([row * 3 // SIDE, column * 3 // SIDE]) * SIDE // 3
        beyond = np.ones_like(part)
        beyond[max(low[0] - 1, 0) : low[0] + 33, max(low[1] - 1, 0) : low[1] + 33] = False
        known &= ~(beyond & whole)
        row, column = (int(edge) + SIDE // 6 for edge in low)
    weights = (known & ~others).astype(np.float32)
    misfit, (shape, radius), y, x = _nearest(alpha * weights, weights, row, column)
    if whole is None and misfit >= MISFIT:
        return None
    size = "大" if radius > MIDDLE else "小"
    place = PLACES[3 * min(2, max(0, int(3 * y))) + min(2, max(0, int(3 * x)))]
    return Seen(Object(shape, COLORS[color], size, place), x, y, radius, misfit)


def _nearest(
    alpha: np.ndarray, weights: np.ndarray, row: int, column: int
) -> tuple[float, tuple[str, float], float, float]:
    """The outline with the least weighted square difference: (misfit, its name, y, x)."""
    names, outlines, areas = _outlines()
    around = HALF + REACH
    near = (slice(row, row + 2 * around + 1), slice(column, column + 2 * around + 1))
    alpha, weights = (_windows(np.pad(values, around)[near]) for values in (alpha, weights))
    # Weights are 0 or 1, and alpha is 0 where they are.
    apart = np.square(alpha).sum(1) - 2 * outlines @ alpha.T + np.square(outlines) @ weights.T
    misfits = apart / areas[:, None]
    outline, offset = np.unravel_index(np.argmin(misfits), misfits.shape)
    down, across = divmod(int(offset), 2 * REACH + 1)
    y, x = ((n - REACH + 0.5) / SIDE for n in (row + down, column + across))
    return float(misfits[outline, offset]), names[outline], y, x


def _windows(around: np.ndarray) -> np.ndarray:
    """Windows at every place of an object's center, `[places, pixels]`."""
    width = 2 * HALF + 1
    found = np.lib.stride_tricks.sliding_window_view(around, (width, width))
    return found.reshape(-1, width * width)


@functools.cache
def _outlines() -> tuple[list[tuple[str, float]], np.ndarray, np.ndarray]:
    """(Shape and radius) of outlines, how much of each pixel of a window each covers, areas."""
    names, rows, fine = [], [], 4
    width = 2 * HALF + 1
    for shape in SHAPES:
        for radius in RADII:
            for turn in (0.0,) if shape == "圆形" else TURNS:
                points = render.outline(shape, HALF + 0.5, HALF + 0.5, radius * SIDE, turn)
                mask = Image.new("L", (width * fine, width * fine), 0)
                corners = [(x * fine, y * fine) for x, y in points]
                ImageDraw.Draw(mask).polygon(corners, fill=255)
                covered = np.asarray(mask.reduce(fine), np.float32) / 255
                # Pictures were resized once, and an autoencoder blurs them a little more.
                rows.append(scipy.ndimage.gaussian_filter(covered, 0.5).ravel())
                names.append((shape, radius))
    outlines = np.stack(rows)
    return names, outlines, outlines.sum(1)
