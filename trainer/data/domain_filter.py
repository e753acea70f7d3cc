"""Reading the candidates of some domains alone, as from a log in which there are no others.

Requests without any such candidate are not there either. Behaviors stay, whatever their domain: they are what
a user had done by the time of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from trainer.data.domain import DomainColumn
from trainer.data.files import RowGroup, ahead
from trainer.data.row_group import FeatureIds
from trainer.data.rows import PlanRows, UserRows, read_plan
from trainer.log.bags import Bags, Ints, offsets_of

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DomainFilter:
    """The domains whose candidates are read.

    Attributes:
        column: where a candidate's domain stands; domains: their ids, ascending.
    """

    column: DomainColumn
    domains: tuple[int, ...]

    def of_plan(self, plan: PlanRows) -> PlanRows:
        """What is left of the plan of a row group, which was read with the domains."""
        assert plan.domain is not None
        kept = _Kept.of(self._holds(plan.domain), plan.candidates, plan.request_offsets)
        return PlanRows(kept.request_offsets, plan.history_end[kept.requests], kept.counts, plan.users)

    def of_rows(self, rows: UserRows) -> UserRows:
        """What is left of a row group."""
        assert rows.domain is not None
        kept = _Kept.of(self._holds(rows.domain), np.diff(rows.candidate_offsets), rows.request_offsets)
        requests, candidates = kept.requests, kept.candidates
        return replace(
            rows,
            request_offsets=kept.request_offsets,
            candidate_offsets=offsets_of(kept.counts),
            request_id=rows.request_id[requests],
            request_time=rows.request_time[requests],
            history_end=rows.history_end[requests],
            context=_chosen(rows.context, requests),
            candidates=_chosen(rows.candidates, candidates),
            labels=rows.labels[candidates],
            numeric=rows.numeric[candidates],
            weight=rows.weight[candidates],
            task_weight=None if rows.task_weight is None else rows.task_weight[candidates],
            domain=rows.domain[candidates],
        )

    def _holds(self, domain: Ints) -> Bools:
        return np.isin(domain, self.domains)


@dataclass(frozen=True)
class _Kept:
    """What a filter leaves of a row group.

    Attributes:
        candidates, requests: places of those that stay, ascending; counts: candidates of these requests.
        request_offsets: [U + 1] into these requests.
    """

    candidates: Ints
    requests: Ints
    counts: Ints
    request_offsets: Ints

    @staticmethod
    def of(holds: Bools, counts: Ints, request_offsets: Ints) -> _Kept:
        """Args: holds: [candidates]; counts: [requests]; request_offsets: [U + 1]."""
        ends = offsets_of(holds.astype(np.int64))[offsets_of(counts)]
        left = np.diff(ends)
        stays = left > 0
        return _Kept(
            np.nonzero(holds)[0],
            np.nonzero(stays)[0],
            left[stays],
            offsets_of(stays.astype(np.int64))[request_offsets],
        )


def _chosen(features: FeatureIds, at: Ints) -> FeatureIds:
    multi = {}
    for name, bags in features.multi.items():
        values, lengths = bags.select(at)
        multi[name] = Bags.of_lengths(values, None if bags.offsets is None else lengths)
    return FeatureIds(features.single, features.ids[:, at], multi)


def candidates_by_domain(
    places: Sequence[RowGroup],
    column: DomainColumn,
    rank: tuple[int, int] = (0, 1),
    share: Callable[[Sequence[int]], list[int]] = list,
) -> Mapping[int, int]:
    """Id of a domain -> its candidates in these row groups, of those that have any, ascending.

    Each rank reads lengths and the domain's column of its part of the row groups. Collective.

    Args:
        rank: (rank, world size); share: sums an array over all ranks.

    Raises:
        DataError: a file is missing or unreadable, or its columns do not fit each other.
    """

    def domains_of(place: RowGroup) -> Ints | None:
        return read_plan(place.file, place.row_group, domain=column).domain

    counts = np.zeros(column.rows, dtype=np.int64)
    for domains in ahead(domains_of, places[rank[0] :: rank[1]]):
        counts += np.bincount(domains, minlength=column.rows)
    every = share(counts.tolist())
    return {domain: count for domain, count in enumerate(every) if count}
