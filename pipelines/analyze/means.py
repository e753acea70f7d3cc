"""Means of values some of which are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean


def mean_of_known(values: Sequence[float]) -> float:
    """The mean of all but NaN; NaN where nothing else is there."""
    there = [value for value in values if not math.isnan(value)]
    return fmean(there) if there else math.nan
