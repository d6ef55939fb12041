"""When each frame of a video is shown, by the stamps of the frames and not by the file's header.

Headers count what was planned or known when they were written, and not every coded frame is shown.
Stamps have faults of their own: some containers have none, some start again in the middle, and
AVI stamps frames in the order in which they are decoded.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

# Stamps are rounded to ticks; Matroska's is a millisecond. A longer one, as AVI's, is a frame, and
# exact.
TICK = Fraction(1, 1000)
BACK = Fraction(1, 10)  # seconds that time may go back before it is another time, as ffmpeg has it
JUMP = 10  # seconds that it may go on


class Stamp(NamedTuple):
    """What a frame says about its time, in ticks; None where it says nothing.

    Attributes:
      shown: presentation time.
      decoded: decoding time, which grows with the frames where the other is missing.
      duration: 0 where nobody knows.
    """

    shown: int | None
    decoded: int | None
    duration: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Frames in the order of showing.

    Attributes:
      stamps: when each of them appears, in ticks, ascending.
      end: when the last one goes.
      origin: when the video's first frame appears; before `stamps[0]` in a later part of a video.
      tick: seconds.
      rate: frames a second by the file's header, 0 where it does not say.
    """

    stamps: Sequence[int]
    end: int
    origin: int
    tick: Fraction
    rate: float = 0.0

    @property
    def length(self) -> Fraction:
        """Seconds from the first frame to the end."""
        return (self.end - self.origin) * self.tick

    @property
    def last(self) -> Fraction:
        """Seconds from the first frame to the last one."""
        return (self.stamps[-1] - self.origin) * self.tick

    def at(self, time: Fraction) -> int:
        """Number of the frame that is shown so many seconds behind the first."""
        return max(bisect.bisect_right(self.stamps, self.stamp(time)) - 1, 0)

    def stamp(self, time: Fraction) -> Fraction:
        """The latest stamp of what is shown so many seconds behind the first frame, in ticks."""
        return self.origin + time / self.tick + 2 * self.rounding

    @property
    def rounding(self) -> Fraction:
        """Ticks by which a stamp may be off."""
        return min(Fraction(1), TICK / self.tick)

    @property
    def even(self) -> bool:
        """Whether all frames are shown equally long, but for rounding."""
        if len(self.stamps) < 2:
            return True
        first, last, steps = self.stamps[0], self.stamps[-1], len(self.stamps) - 1
        whole = last - first
        off = max(abs((x - first) * steps - n * whole) for n, x in enumerate(self.stamps))
        held = abs((self.end - last) * steps - whole)
        return off <= self.rounding * steps and held <= 2 * self.rounding * steps


def uniform_times(start: Fraction, length: Fraction, wanted: int) -> list[Fraction]:
    """Centers of `wanted` equal parts of a time, in seconds."""
    return [start + (2 * part + 1) * length / (2 * wanted) for part in range(wanted)]


def uniform_frames(shown: Timeline, wanted: int) -> list[int]:
    """Numbers of the frames at the centers of `wanted` equal parts of a whole video."""
    if shown.even:  # then rounded stamps need not decide between two frames
        count = len(shown.stamps)
        return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]
    return [shown.at(time) for time in uniform_times(Fraction(0), shown.length, wanted)]


def timeline(
    found: Sequence[Stamp], tick: Fraction, usual: Fraction, jumps: bool = False
) -> Timeline:
    """The timeline of a whole video; mends stamps that are missing or start again.

    Args:
      found: of all frames in the order of showing, at least one.
      tick: seconds.
      usual: seconds that a frame is shown where nothing says how long.
      jumps: in this kind of file time may jump ahead from one recording to the next.
    """
    default = max(round(usual / tick), 1)
    steps = [stamp.duration or default for stamp in found]
    shown, decoded = ([stamp[kind] for stamp in found] for kind in (0, 1))
    fewer = shown if _faults(shown) <= _faults(decoded) else decoded
    stamps = _mended(fewer, steps, BACK / tick, JUMP / tick if jumps else None)
    return Timeline(stamps, stamps[-1] + _last(stamps, found, default), stamps[0], tick)


def _last(stamps: Sequence[int], found: Sequence[Stamp], default: int) -> int:
    """Ticks for which the last frame is shown.

    What the file states is believed where it is right about all others; MP4 states how long frames
    are decoded, and Matroska the usual duration. Else it is as long as most.
    """
    gaps = [after - before for before, after in itertools.pairwise(stamps)]
    right = all(abs(gap - one.duration) <= 1 for gap, one in zip(gaps, found, strict=False))
    stated = found[-1].duration if right else 0
    return stated or (statistics.median_low(gaps) if gaps else 0) or default


def ordered(stamps: Sequence[int | None]) -> bool:
    """Whether each stamp is known and later than the one before."""
    return not _faults(stamps)


def _faults(stamps: Sequence[int | None]) -> int:
    """How many stamps are missing or not later than the one before."""
    count, before = 0, None
    for stamp in stamps:
        count += stamp is None or (before is not None and stamp <= before)
        before = before if stamp is None else stamp
    return count


def _mended(
    stamps: Sequence[int | None], steps: Sequence[int], back: Fraction, jump: Fraction | None
) -> list[int]:
    """Stamps that never fall.

    Args:
      stamps: of each frame.
      steps: ticks that each frame is shown, for gaps.
      back, jump: ticks behind the frame before, and ahead of it, from which on a stamp is of
        another recording that follows without a break; None for no bound.
    """
    made: list[int] = []
    shift = 0
    for number, stamp in enumerate(stamps):
        if not made:
            made.append(stamp or 0)
            continue
        last = made[-1]
        follows = last + steps[number - 1]
        now = follows if stamp is None else stamp + shift
        if now < last - back or (jump is not None and now > last + jump):
            shift += follows - now
            now = follows
        made.append(max(now, last))
    return made
