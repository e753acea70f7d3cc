"""A part of a split that stands for the whole: whole users, the same ones at every reading and on every rank.

A user belongs to it by a hash of the user's id: neither the order of the log nor labels decide, and users
stay independent of one another, so that intervals mean what they mean for the whole. Row groups are drawn
first, by a hash of their place, or each would be opened for the few users that it has of a small sample.
Users of one row group may be alike (all of them new, say), so that many more row groups are drawn than the
sample would fill.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from embeddings.ids.hashing import hashed
from trainer.data.rows import PlanRows
from trainer.log.bags import Ints

Bools = npt.NDArray[np.bool_]
_Place = TypeVar("_Place")

# Row groups that are drawn: so many times those that would do, and never fewer than so many.
_SPREAD, _FEWEST = 4, 256


@dataclass(frozen=True)
class Sample:
    """Which row groups are read of a split, and the share of their users."""

    row_groups: int
    users: float

    @staticmethod
    def of(candidates: int, row_groups: int, limit: int) -> Sample | None:
        """A sample of about `limit` candidates (0 = no limit); None where the whole split is no more.

        Args:
            candidates, row_groups: of the split.
        """
        if not limit or candidates <= limit:
            return None
        wanted = limit / candidates * row_groups
        drawn = min(row_groups, max(_FEWEST, math.ceil(_SPREAD * wanted)))
        return Sample(drawn, wanted / drawn)

    def places(self, places: Sequence[_Place]) -> list[_Place]:
        """The row groups that are drawn, in their order."""
        # Hashed twice: users may be numbered as their row groups are.
        order = np.argsort(hashed(hashed(np.arange(len(places)))), kind="stable")
        return [places[number] for number in np.sort(order[: self.row_groups]).tolist()]

    def holds(self, users: Ints) -> Bools:
        """[n], whether each of the users belongs to it."""
        # The upper 53 bits, as a number in [0, 1).
        chosen: Bools = (hashed(users) >> np.uint64(11)) * 2.0**-53 < self.users
        return chosen

    def of_plan(self, plan: PlanRows) -> PlanRows:
        """A row group's plan, read with its users, in which the requests of others ask for nothing."""
        assert plan.users is not None
        kept = np.repeat(self.holds(plan.users), np.diff(plan.request_offsets))
        return replace(
            plan,
            history_end=np.where(kept, plan.history_end, 0),
            candidates=np.where(kept, plan.candidates, 0),
        )

    def line(self, read: int, candidates: int) -> str:
        """What it is, of so many candidates of which about `read` are read."""
        return (
            f"about {read:,} of {candidates:,} candidates, those of {self.users:.1%} of the users in "
            f"{self.row_groups:,} row groups, the same each time"
        )
