"""User blocks are cut by the time of their requests; a piece keeps the history that its requests may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]
_PER_BEHAVIOR = ("history_", "cluster_")
_COUNTS = ("num_behaviors", "num_requests", "num_candidates")


@dataclass(frozen=True)
class Pieces:
    """Consecutive requests of one row that lie in one span of time. P pieces.

    Attributes:
        row: [P]; span: [P], which span of time; first, last: [P], requests [first, last) of all rows.
    """

    row: Ints
    span: Ints
    first: Ints
    last: Ints

    @staticmethod
    def of(table: pa.Table, span_of: Callable[[Ints], Ints]) -> Pieces:
        """The pieces of user blocks, in stored order.

        Args:
            table: rows of `trainer.log.schema.schema_of`; span_of: request times -> spans.
        """
        offsets, times = _lists(table["request_timestamp"])
        row = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
        span = span_of(times.to_numpy())
        begins = np.ones(row.size, dtype=bool)
        begins[1:] = (row[1:] != row[:-1]) | (span[1:] != span[:-1])
        first = np.flatnonzero(begins)
        return Pieces(row[first], span[first], first, np.append(first[1:], row.size)[: first.size])

    def chosen(self, which: npt.NDArray[np.bool_]) -> Pieces:
        """Some of them."""
        return Pieces(self.row[which], self.span[which], self.first[which], self.last[which])


def cut(table: pa.Table, pieces: Pieces, max_history: int = 0) -> pa.Table:
    """One row a piece, in the same columns.

    Args:
        table: that the pieces are of.
        max_history: the newest behaviors that each request keeps at least; older ones than any request of the
            piece keeps are left out. 0: all stay.
    """
    if not pieces.first.size:
        return table.slice(0, 0)
    lengths = pieces.last - pieces.first
    requests = _ranges(pieces.first, lengths), _offsets(lengths)
    ends = _lists(table["request_history_end"])[1].to_numpy()[requests[0]]
    newest = np.maximum.reduceat(ends, requests[1][:-1])
    oldest = np.zeros_like(newest)
    if max_history:
        oldest = np.maximum(np.minimum.reduceat(ends, requests[1][:-1]) - max_history, 0)
    starts = _lists(table["history_timestamp"])[0][pieces.row]
    behaviors = _ranges(starts + oldest, newest - oldest), _offsets(newest - oldest)
    columns = {"user_id": table["user_id"].take(pa.array(pieces.row))}
    for name in table.column_names:
        if name not in ("user_id", *_COUNTS):
            columns[name] = _slices(table[name], *(behaviors if name.startswith(_PER_BEHAVIOR) else requests))
    columns["request_history_end"] = _listed(pa.array(ends - np.repeat(oldest, lengths)), requests[1])
    shown = _lists(table["request_num_candidates"])[1].to_numpy()[requests[0]]
    counts = (newest - oldest, lengths, np.add.reduceat(shown, requests[1][:-1]))
    columns |= dict(zip(_COUNTS, map(pa.array, counts), strict=True))
    return pa.table({name: columns[name] for name in table.column_names})


def by_time(table: pa.Table) -> pa.Table:
    """The rows in the order of their first requests, those of one second by user and request."""
    firsts = {
        name: pc.list_element(table[name].combine_chunks(), 0) for name in ("request_timestamp", "request_id")
    }
    keys = pa.table(
        {"time": firsts["request_timestamp"], "user": table["user_id"], "id": firsts["request_id"]}
    )
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names])
    return table.take(order)


def _lists(column: pa.ChunkedArray) -> tuple[Ints, pa.Array]:
    """Offsets from zero, and the items, of a list column."""
    array = _whole(column)
    offsets = array.offsets.to_numpy().astype(np.int64)
    if not offsets.size:
        offsets = np.zeros(1, dtype=np.int64)
    return offsets - offsets[0], array.values.slice(offsets[0], offsets[-1] - offsets[0])


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _slices(column: pa.ChunkedArray, items: Ints, offsets: Ints) -> pa.Array:
    return _listed(_lists(column)[1].take(pa.array(items)), offsets)


def _listed(items: pa.Array, offsets: Ints) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items)


def _offsets(lengths: Ints | Sequence[int]) -> Ints:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """start, start + 1, ... of each range, one after the other."""
    offsets = _offsets(lengths)
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
