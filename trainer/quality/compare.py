"""Scores of the same candidates from two places: how far they lie apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from embeddings.errors import DataError
from trainer.quality.metrics import group_keys
from trainer.quality.ranking import Ints
from trainer.quality.runs import ORDER
from trainer.quality.score_files import joined
from trainer.quality.scored import Scored, Scores


def compare_scores(some: Scores, all_scores: Scores) -> tuple[float, float]:
    """Find every candidate of `some` in `all_scores`; both are read once, side by side.

    Tasks are compared by name, or by place where one side has numbers only.

    Returns:
        The largest absolute difference (infinite if a candidate is missing, NaN if a score is), and the share
        of candidates whose scores are bit-equal.

    Raises:
        DataError: the tasks are not the same.
    """
    columns = _same_tasks(some.tasks, all_scores.tasks)
    if not some.size or not all_scores.size:
        return float("inf"), 0.0
    worst, equal, others = 0.0, 0, _Ahead(all_scores.chunks())
    for mine in some.chunks():
        other = others.of_users(int(mine.user_id.min()), int(mine.user_id.max()))
        place = _places(mine, other)
        if place is None:
            return float("inf"), 0.0
        score = other.score[place][:, columns]
        # Unlike Python's `max`, it keeps a NaN.
        worst = float(np.maximum(worst, np.abs(mine.score - score).max()))
        equal += int((mine.score == score).all(axis=1).sum())
    return worst, equal / some.size


def _same_tasks(some: Sequence[str], known: Sequence[str]) -> list[int]:
    """Which of the known tasks each of some is."""
    numbered = tuple(map(str, range(len(some))))
    if sorted(some) == sorted(known):
        return [known.index(task) for task in some]
    if len(some) == len(known) and numbered in (tuple(some), tuple(known)):
        return list(range(len(some)))
    raise DataError(f"scores of {', '.join(known)} cannot be compared with those of {', '.join(some)}")


class _Ahead:
    """Chunks of whole users in ascending order, of which ranges of users are taken, in that order too."""

    def __init__(self, chunks: Iterator[Scored]) -> None:
        self._chunks, self._left = chunks, next(chunks)

    def of_users(self, first: int, last: int) -> Scored:
        found = []
        while True:
            users = self._left.user_id
            found.append(self._left.part((users >= first) & (users <= last)))
            self._left = self._left.part(users > last)
            following = None if self._left.size else next(self._chunks, None)
            if following is None:
                return joined(found)
            self._left = following


def _places(mine: Scored, other: Scored) -> Ints | None:
    """Where each candidate is among the others; None if one is missing."""
    if not other.size:
        return None
    keys = [np.r_[getattr(other, name), getattr(mine, name)] for name in ORDER]
    known, wanted = np.split(group_keys(*keys), [other.size])
    order = np.argsort(known, kind="stable")
    place = order[np.searchsorted(known[order], wanted).clip(max=order.size - 1)]
    return None if (known[place] != wanted).any() else place
