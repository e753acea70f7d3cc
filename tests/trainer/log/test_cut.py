"""Rows cut by time, against a loop over requests."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.logs import Row, Shape, enrich, manifest_of, random_rows
from trainer.log.cut import Pieces, by_time, cut
from trainer.log.schema import schema_of

MANIFEST = manifest_of(rich=True)
SCHEMA = schema_of(MANIFEST)


def requests_of(rows: list[Row], newest: int = 0) -> Iterator[Row]:
    """One entry a request: all that the log says of it, with the behaviors that it sees, or the newest."""
    for row in rows:
        for place, end in enumerate(row["request_history_end"]):
            seen = slice(max(end - newest, 0) if newest else 0, end)
            own = {
                name: values[place]
                for name, values in row.items()
                if isinstance(values, list)
                and not name.startswith("history_")
                and name != "request_history_end"
            }
            history = {name: values[seen] for name, values in row.items() if name.startswith("history_")}
            yield {"user_id": row["user_id"], **own, **history}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), every=st.integers(1, 60), first=st.integers(-5, 80), most=st.integers(0, 9))
def test_every_request_is_in_the_piece_of_its_time_and_sees_what_it_saw(
    seed: int, every: int, first: int, most: int
) -> None:
    rows = enrich(random_rows(seed, Shape(users=4, behaviors=12)), seed)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pieces = Pieces.of(table, lambda times: np.maximum((times - first) // every, -1))
    made = cut(table, pieces, most).cast(SCHEMA)
    got = made.to_pylist()
    # Whole histories: pieces with a limit keep more than it where an older request needs that.
    assert list(requests_of(got, most)) == list(requests_of(table.to_pylist(), most))
    for row, span in zip(got, pieces.span.tolist(), strict=True):
        assert {max((time - first) // every, -1) for time in row["request_timestamp"]} == {span}
        assert len(row["history_timestamp"]) == row["num_behaviors"] == max(row["request_history_end"])
        assert sum(row["request_num_candidates"]) == row["num_candidates"]
        assert len(row["request_id"]) == row["num_requests"]
    order = [(r["request_timestamp"][0], r["user_id"], r["request_id"][0]) for r in by_time(made).to_pylist()]
    assert order == sorted((r["request_timestamp"][0], r["user_id"], r["request_id"][0]) for r in got)


@given(which=st.lists(st.booleans(), min_size=30, max_size=30))
@settings(deadline=None, max_examples=20)
def test_some_pieces_are_those_rows_of_all_pieces(which: list[bool]) -> None:
    rows = enrich(random_rows(3, Shape(users=5, behaviors=12)), 3)
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pieces = Pieces.of(table, lambda times: times // 20)
    chosen = np.array(which)[: pieces.row.size]
    part = cut(table, pieces.chosen(chosen), 4).cast(SCHEMA)
    assert part.equals(cut(table, pieces, 4).cast(SCHEMA).filter(pa.array(chosen)))
