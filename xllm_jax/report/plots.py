"""Curves and bars as SVG without any library."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 320, 170, 40, 24, 8
Points = Sequence[Sequence[float]]


def curve(name: str, points: Points) -> str:
    """One curve on a logarithmic axis, with its last value.

    Args:
      name: title.
      points: (step, loss) pairs; losses that are not positive and finite are left out.
    """
    points = [(x, y) for x, y in points if math.isfinite(y) and y > 0]
    if len(points) < 2:
        return ""
    steps, losses = zip(*points)
    low, high = math.log10(min(losses)), math.log10(max(losses))
    low, high = (low - 0.1, high + 0.1) if high - low < 0.05 else (low, high)

    def place(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 8) * (step - steps[0]) / max(steps[-1] - steps[0], 1)
        share = (math.log10(loss) - low) / (high - low)
        return f"{x:.1f},{HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP):.1f}"

    marks = "".join(_mark(10 ** (low + share * (high - low)), share) for share in (0, 0.5, 1))
    line = " ".join(place(step, loss) for step, loss in points)
    drawn = f'{marks}<polyline points="{line}"/>'
    ends = _ends(f"{steps[0]:.0f}", f"step {steps[-1]:.0f}")
    return _figure(name, f"{losses[-1]:.3g}", drawn + ends, "loss of ")


def channels(name: str, values: Sequence[Sequence[float]]) -> str:
    """A time series, every channel as a line over its steps.

    Args:
      name: title.
      values: of each channel, its value at every step; at least one of both.
    """
    flat = [value for channel in values for value in channel]
    low, high = min(flat), max(flat)
    across, tall = (WIDTH - LEFT - 8) / max(len(values[0]) - 1, 1), HEIGHT - BOTTOM - TOP

    def share(value: float) -> float:
        return (value - low) / (high - low) if high > low else 0.5

    lines = "".join(
        '<polyline points="'
        + " ".join(
            f"{LEFT + step * across:.1f},{HEIGHT - BOTTOM - share(value) * tall:.1f}"
            for step, value in enumerate(channel)
        )
        + '"/>'
        for channel in values
    )
    marks = _mark(low, 0) + (_mark(high, 1) if high > low else "")
    return _figure(name, f"{len(values)} × {len(values[0])}", marks + lines)


def _figure(name: str, number: str, drawn: str, what: str = "") -> str:
    """A drawing with its title and a number beside it."""
    title = html.escape(name)
    return (
        f'<figure class="curve"><figcaption>{title} <b>{number}</b></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{what}{title}">'
        f"{drawn}</svg></figure>"
    )


def _ends(first: str, last: str) -> str:
    """What stands below both ends of the axis."""
    return (
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{first}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{last}</text>'
    )


def _mark(value: float, share: float) -> str:
    """A horizontal line with its value."""
    y = HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>'
    )


def histogram(name: str, values: Sequence[int], bins: int = 20) -> str:
    """How often values fall into equal ranges, as bars.

    Args:
      name: title.
      values: whole numbers, at least one.
      bins: most bars.
    """
    low, high = min(values), max(values)
    width = max(-(-(high - low + 1) // bins), 1)
    counts = [0] * ((high - low) // width + 1)
    for value in values:
        counts[(value - low) // width] += 1
    across, tall = (WIDTH - LEFT - 8) / len(counts), HEIGHT - BOTTOM - TOP
    bars = "".join(
        f'<rect x="{LEFT + number * across:.1f}" width="{max(across - 1, 1):.1f}" '
        f'y="{HEIGHT - BOTTOM - tall * count / max(counts):.1f}" '
        f'height="{tall * count / max(counts):.1f}" fill="currentColor" opacity=".55"/>'
        for number, count in enumerate(counts)
    )
    most = f'<text x="{LEFT - 5}" y="{TOP + 8}" text-anchor="end">{max(counts)}</text>'
    return _figure(name, str(len(values)), bars + most + _ends(str(low), str(high)))
