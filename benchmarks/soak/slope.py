"""How fast memory grows: a line through means of minutes, with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_FEWEST = 4


@dataclass(frozen=True)
class Slope:
    """MB an hour and the half width of its 95 % interval; NaN where there are too few blocks.

    Attributes:
        blocks: means that the line goes through; begin, end: the line's own values there, in MB.
    """

    mb_per_hour: float
    half: float
    blocks: int
    begin: float
    end: float


def slope_of(seconds: Sequence[float], megabytes: Sequence[float], block: float, warm: float) -> Slope:
    """Least squares through the means of blocks of time.

    Samples of one minute are not independent: memory goes up with a new version and down with an old one. So
    a block is as long as a version is served, and its mean is one observation (Student's t, blocks - 2
    degrees of freedom).

    Args:
        seconds: of each sample since the start; block: seconds of a block; warm: seconds that do not count.
    """
    time, value = np.asarray(seconds, dtype=float), np.asarray(megabytes, dtype=float)
    late = time >= warm
    time, value = time[late], value[late]
    number = np.floor((time - warm) / block) if time.size else time
    blocks = [number == each for each in np.unique(number)]
    x = np.array([time[each].mean() / 3600 for each in blocks])
    y = np.array([value[each].mean() for each in blocks])
    if x.size < _FEWEST:
        return Slope(math.nan, math.nan, int(x.size), math.nan, math.nan)
    line = stats.linregress(x, y)
    half = float(stats.t.ppf(0.975, x.size - 2) * line.stderr)
    ends = [float(line.intercept + line.slope * each) for each in (x[0], x[-1])]
    return Slope(float(line.slope), half, int(x.size), *ends)
