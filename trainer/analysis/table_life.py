"""How the rows of a table live: which were ever updated, how long their vectors are, how stale they are.

Tables are read from a checkpoint a band of rows at a time; what stays is a number a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trainer.checkpoint.accumulators import updated
from trainer.checkpoint.tensors import TensorReader
from trainer.quality.ranking import Bools, Floats, Ints

Norms = npt.NDArray[np.float32]
# Numbers of the optimizer's state that are read at a time, if it keeps one a weight.
_AT_ONCE = 1 << 24
_DAY = 86_400
# Days since an id was seen last, by which rows are counted.
AGES = (0, 1, 7, 30, 90, 365)
COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)


def row_norms(reader: TensorReader, weight: str) -> Norms:
    """[rows], the length (Euclidean norm) of each row's vector; weight: the name of the table's tensor."""
    norms = np.empty(reader.shape(weight)[0], dtype=np.float32)
    for first, band in reader.bands(weight):
        norms[first : first + band.shape[0]] = torch.linalg.vector_norm(band.float(), dim=1).numpy()
    return norms


def updated_rows(reader: TensorReader, weight: str) -> Bools | None:
    """[rows], whether the optimizer's state of a row is not zero: a gradient has reached it.

    None where the optimizer keeps no state (SGD).
    """
    rows, width = reader.shape(weight)
    found, at_once = np.zeros(rows, dtype=np.bool_), max(1, _AT_ONCE // width)
    for start in range(0, rows, at_once):
        part = updated(reader, weight, start, min(start + at_once, rows))
        if part is None:
            return None
        found[start : start + at_once] = part.numpy()
    return found


@dataclass(frozen=True)
class NormBand:
    """The rows whose ids were seen about equally often.

    Attributes:
        low, high: how often, high is the first number that is too large, None = none is; rows: how many.
        tenth, median, ninetieth: percentiles of their norms.
    """

    low: int
    high: int | None
    rows: int
    tenth: float
    median: float
    ninetieth: float


def norms_by_count(norms: Norms, count: Ints) -> list[NormBand]:
    """Percentiles of norms by how often ids were seen, [rows] each; bands without a row are left out."""
    return list(_bands(norms, np.searchsorted(COUNTS, count, side="right") - 1))


def _bands(norms: Norms, place: Ints) -> Iterator[NormBand]:
    for number, low in enumerate(COUNTS):
        inside = norms[place == number]
        if inside.size:
            tenth, median, ninetieth = np.percentile(inside, [10, 50, 90]).tolist()
            high = COUNTS[number + 1] if number + 1 < len(COUNTS) else None
            yield NormBand(low, high, inside.size, tenth, median, ninetieth)


def share_of_top(count: Ints, share: float = 0.01) -> float:
    """The part of all look-ups that goes to the most frequent rows; NaN where nothing was looked up.

    Args:
        count: [rows]; share: of the rows that were looked up at all, at least one of them.
    """
    seen = count[count > 0]
    if not seen.size:
        return float("nan")
    top = max(1, round(share * seen.size))
    return float(np.partition(seen, seen.size - top)[seen.size - top :].sum()) / float(seen.sum())


def hottest(count: Ints, number: int = 10) -> Ints:
    """The rows that are looked up most, the most frequent first; of equal ones the smaller row first."""
    top = min(number, int((count > 0).sum()))
    if not top:
        return np.zeros(0, dtype=np.int64)
    # Rows as frequent as the last of them are all looked at, so that ties do not depend on the algorithm.
    least = np.partition(count, count.size - top)[count.size - top]
    rows = np.nonzero(count >= least)[0]
    return rows[np.lexsort((rows, -count[rows]))][:top]


def staleness(last: Ints, now: int) -> Ints:
    """[len(AGES)], how many ids were seen last so many days before `now`, [AGES[i], AGES[i + 1]) days.

    Args:
        last: when each id was seen last, seconds, of ids that were seen; now: time of the newest request.
    """
    days = (now - last) // _DAY
    places = (np.searchsorted(AGES, days, side="right") - 1).clip(min=0)
    return np.bincount(places, minlength=len(AGES))


def median_age(last: Ints, now: int) -> float:
    """Days since an id was seen last, the median; NaN of none."""
    return float(np.median(now - last)) / _DAY if last.size else float("nan")


def middle_and_high(norms: Floats | Norms) -> tuple[float, float]:
    """-> (median, 99th percentile) of norms; NaN of none."""
    if not norms.size:
        return float("nan"), float("nan")
    median, high = np.percentile(norms, [50, 99]).tolist()
    return median, high
