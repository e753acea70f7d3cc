"""The metrics of `trainer.quality.metrics`, of more candidates than memory holds.

What one request or user decides is added up while candidates pass by. AUC and ECE need all candidates by
score: these are written to buckets by ascending score, and one bucket at a time is ranked, exactly and with
its ties. Memory follows the users (about 90 bytes each) and the candidates of one bucket, not the split.

Sums are taken in another order than in memory, which is all that differs: metrics agree to 1e-12. For what
is a difference of nearly equal numbers, such as a lead over a baseline, this is an absolute error, not a
relative one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from trainer.quality.leads import Estimate
from trainer.quality.metrics import Metrics, calibration, candidate_losses, normalised_loss, ratio_influence
from trainer.quality.ranking import RANKS, Floats, Ints, Ranked, as_arrays, half_width
from trainer.quality.runs import RowFile

# Candidates that are ranked together.
_BUCKET = 1 << 22
_BINS = 20
_ROW = np.dtype([("score", "<f8"), ("label", "<f4"), ("user", "<u4")])


class Part(NamedTuple):
    """Candidates of whole users.

    Attributes:
        score, label: [n]; group: [n] the request of each, by whatever integers; user: [n], numbered from 0
            within the part.
        weight: [n], of the loss; None where candidates have none.
    """

    score: npt.NDArray[Any]
    label: npt.NDArray[Any]
    group: Ints
    user: Ints
    weight: npt.NDArray[Any] | None = None


Parts = Callable[[], Iterator[Part]]
"""The same parts each time that it is called, each user in one of them."""


@dataclass(frozen=True)
class Assessment:
    """Metrics, and what each user adds to the error of some.

    Attributes:
        ranking, calibration: as `ranking_metrics` and `calibration_metrics` have them; the second is empty
            where scores are no probabilities. counts: the others of `Metrics`.
        of_users: [users] each, for `auc`, `gauc` and, of probabilities, `logloss`.
    """

    ranking: dict[str, Any]
    calibration: dict[str, Any]
    counts: dict[str, int]
    of_users: dict[str, Floats]

    def metrics(self) -> Metrics:
        return Metrics(**self.ranking, **self.calibration, **self.counts)

    def estimates(self) -> dict[str, Estimate]:
        """As `trainer.quality.leads.estimates`."""
        values = {**self.ranking, **self.calibration}
        return {name: (values[name], users) for name, users in self.of_users.items()}


def assess(parts: Parts, probable: bool, scratch: Path) -> Assessment:
    """Measure candidates in three passes, the third over buckets of what the second wrote.

    Args:
        probable: whether scores are probabilities; scratch: a folder for 16 bytes a candidate.

    Raises:
        DataError: as `measure`. OSError: the folder is full.
    """
    sums = _Sums(probable)
    for part in parts():
        sums.add(part)
    sums.close()
    ranks = _Ranks(sums)
    buckets = [RowFile(scratch / f"bucket-{number:05d}", _ROW) for number in range(sums.buckets)]
    try:
        first = 0
        for part in parts():
            _scatter(part, first, sums.edges, buckets)
            first += int(part.user.max(initial=-1)) + 1
        for bucket in buckets:
            ranks.add(bucket)
            bucket.remove()
    finally:
        for bucket in buckets:
            bucket.remove()
    return _assessment(sums, ranks, probable)


class _Sums:
    """What needs no order of all candidates."""

    def __init__(self, probable: bool) -> None:
        self._probable = probable
        self._cells = np.zeros(1 << 16, dtype=np.int64)
        self._of_users: list[Floats] = []
        self.candidates = self.positives = self.requests = 0
        # Requests with both classes, those of them that HR counts, and users with both classes.
        self.groups = self.counted = self.users_with_both = 0
        self.label = self.negative = 0.0
        # Of scores and labels, each times its weight; None without weights.
        self.weighted: Floats | None = None
        self.gauc, self.gauc_user = np.zeros(2), np.zeros(2)
        self.at = {k: np.zeros(2) for k in RANKS}

    def add(self, part: Part) -> None:
        s, y = as_arrays(part.score, part.label, part.group, part.user)
        if not y.size:
            return
        by_request, by_user = Ranked.of(s, y, part.group), Ranked.of(s, y, part.user)
        self.candidates += y.size
        self.positives += int((y >= 0.5).sum())
        self.requests += by_request.sizes.size
        self.groups += int(by_request.both.sum())
        self.users_with_both += int(by_user.both.sum())
        self.label += float(y.sum())
        self.negative += float((1 - y).sum())
        self.gauc += _weighted(by_request).sum(axis=1)
        self.gauc_user += _weighted(by_user).sum(axis=1)
        for k in RANKS:
            hits, gains = by_request.gains(k)
            self.at[k] += hits.sum(), gains.sum()
        self.counted += hits.size
        users = int(part.user.max()) + 1
        own: list[npt.NDArray[Any]] = [
            np.bincount(by_request.of_groups(part.user), row, users) for row in _weighted(by_request)
        ]
        own += [np.bincount(part.user, y, users), np.bincount(part.user, np.ones(y.size), users)]
        if self._probable:
            each = candidate_losses(s, y)
            own += [np.bincount(part.user, each, users), np.bincount(part.user, s, users)]
            if part.weight is not None:
                total = np.stack([s, y]) @ part.weight.astype(np.float64)
                self.weighted = total if self.weighted is None else self.weighted + total
        self._of_users.append(np.stack(own))
        self._cells += np.bincount(_cell(s), minlength=self._cells.size)

    def close(self) -> None:
        """Put the users together, and choose the buckets."""
        rows = 6 if self._probable else 4
        of_users = np.concatenate(self._of_users, axis=1) if self._of_users else np.zeros((rows, 0))
        self._of_users.clear()
        # [users] each: AUC of their requests times candidates, such candidates, labels, candidates, and of
        # probabilities losses and predictions.
        self.of_users = of_users
        filled = (np.cumsum(self._cells) - 1).clip(min=0) // _BUCKET
        # Cell -> bucket, ascending. A cell is never divided: `_Ranks` takes a bucket of any size.
        self.edges = np.unique(filled, return_inverse=True)[1]
        self.buckets = int(self.edges.max()) + 1


def _weighted(ranked: Ranked) -> Floats:
    """[2, groups], AUC times candidates, and candidates, of the groups with both classes; 0 of others."""
    weight = np.where(ranked.both, ranked.sizes, 0.0)
    return np.stack([weight * np.nan_to_num(ranked.values), weight])


def _cell(scores: Floats) -> Ints:
    """The upper 16 bits of each score as float32, so that larger scores are in no lower cell."""
    bits = scores.astype(np.float32).view(np.int32).astype(np.int64)
    # Of negative numbers, those with larger bits are less.
    ascending = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    cells: Ints = (ascending >> 16) + (1 << 15)
    return cells


def _scatter(part: Part, first: int, edges: Ints, buckets: Sequence[RowFile]) -> None:
    """Write candidates to buckets of ascending scores, with the numbers of their users from `first` on."""
    rows = np.empty(part.score.size, dtype=_ROW)
    rows["score"], rows["label"], rows["user"] = part.score, part.label, part.user + first
    number = edges[_cell(rows["score"])]
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(len(buckets) + 1))
    for bucket, begin, end in zip(buckets, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if end > begin:
            bucket.write(rows[order[begin:end]])


class _Ranks:
    """What the order of all candidates decides, from buckets of ascending score.

    Attributes:
        won: labels times the negatives below them; of_users: [users], what follows from it for their error.
        gaps: predictions less labels, by bin of `calibration_error`.
    """

    def __init__(self, sums: _Sums) -> None:
        self._sums = sums
        self._seen, self._positive, self._negative = 0, 0.0, 0.0
        self.won = 0.0
        self.of_users = np.zeros(sums.of_users.shape[1])
        self.gaps = np.zeros(_BINS)

    def add(self, bucket: RowFile) -> None:
        distinct, placed = _distinct(bucket)
        size = distinct.size
        count, positive, negative = np.zeros(size, dtype=np.int64), np.zeros(size), np.zeros(size)
        for rows, at in placed():
            label = rows["label"].astype(np.float64)
            count += np.bincount(at, minlength=size)
            positive += np.bincount(at, label, size)
            negative += np.bincount(at, 1 - label, size)
        total = self._sums
        # As `auc_influence`: the weight of negatives below each score, and of positives above it.
        beaten = self._negative + np.cumsum(negative) - negative / 2
        above = total.label - (self._positive + np.cumsum(positive) - positive / 2)
        pairs = max(total.label * total.negative, 1e-300)
        for rows, at in placed():
            label = rows["label"].astype(np.float64)
            won = label * beaten[at]
            self.won += float(won.sum())
            part = (won + (1 - label) * above[at]) / pairs
            self.of_users += np.bincount(rows["user"], part, self.of_users.size)
        ends = self._seen + np.cumsum(count)
        bins = (2 * ends - count) * _BINS // (2 * max(total.candidates, 1))
        self.gaps += np.bincount(bins, count * distinct - positive, _BINS)
        self._seen += int(count.sum())
        self._positive += float(positive.sum())
        self._negative += float(negative.sum())


_Placed = Callable[[], Iterable[tuple[npt.NDArray[Any], Ints]]]


def _distinct(bucket: RowFile) -> tuple[Floats, _Placed]:
    """-> (the different scores, ascending; pieces of rows with the place of each row's score among them)."""
    if bucket.rows <= _BUCKET:
        rows = next(bucket.pieces(_BUCKET), np.empty(0, dtype=_ROW))
        distinct, at = np.unique(rows["score"], return_inverse=True)
        return distinct, lambda: [(rows, at)]
    # More candidates than are ranked together have so close scores, or the very same.
    distinct = np.zeros(0)
    for rows in bucket.pieces(_BUCKET):
        distinct = np.union1d(distinct, rows["score"])
    return distinct, lambda: (
        (rows, np.searchsorted(distinct, rows["score"])) for rows in bucket.pieces(_BUCKET)
    )


def _assessment(sums: _Sums, ranks: _Ranks, probable: bool) -> Assessment:
    times, weight, label, candidates, *probable_sums = sums.of_users
    users = np.arange(label.size)
    both = sums.label > 0 and sums.negative > 0
    auc, of_auc = math.nan, np.zeros(users.size)
    if both:
        auc = ranks.won / (sums.label * sums.negative)
        of_auc = ranks.of_users - auc * (label / sums.label + (candidates - label) / sums.negative)
    gauc, of_gauc = _mean(sums.gauc), np.zeros(users.size)
    if sums.groups:
        of_gauc = (times - gauc * weight) / max(sums.gauc[1], 1)
    at = {k: total / sums.counted if sums.counted else total + math.nan for k, total in sums.at.items()}
    ranking = {
        "auc": auc,
        "auc_ci": half_width(of_auc, users) if both else math.nan,
        "gauc": gauc,
        "gauc_ci": half_width(of_gauc, users) if sums.groups else math.nan,
        "gauc_user": _mean(sums.gauc_user),
        **{f"hr_{k}": float(found[0]) for k, found in at.items()},
        **{f"ndcg_{k}": float(found[1]) for k, found in at.items() if k > 1},
        "groups": sums.groups,
        "users": sums.users_with_both,
    }
    counts = {"samples": sums.candidates, "positives": sums.positives, "requests": sums.requests}
    of_users = {"auc": of_auc, "gauc": of_gauc}
    if not probable:
        return Assessment(ranking, {}, counts, of_users)
    losses, predicted = probable_sums
    (loss, of_users["logloss"]), (pcoc, of_pcoc) = (
        ratio_influence(losses, candidates),
        ratio_influence(predicted, label),
    )
    n = sums.candidates
    rate = sums.label / n if n else math.nan
    found = {
        "logloss": loss,
        "logloss_ci": half_width(of_users["logloss"], users) if n else math.nan,
        "ne": normalised_loss(loss, rate),
        "pcoc": pcoc,
        "pcoc_ci": half_width(of_pcoc, users) if sums.label else math.nan,
        "ece": float(np.abs(ranks.gaps).sum()) / n if n else math.nan,
        "rate": rate,
    }
    if sums.weighted is not None:
        found["pcoc_weighted"] = calibration(float(sums.weighted[0]), float(sums.weighted[1]))
    return Assessment(ranking, found, counts, of_users)


def _mean(total: Floats) -> float:
    return float(total[0] / total[1]) if total[1] else math.nan
