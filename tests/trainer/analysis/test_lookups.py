"""Look-ups and last sightings of ids, against a loop over the rows of a log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embeddings.errors import DataError
from tests.helpers.logs import CONTEXT, RICH, Row, Shape, enrich, random_rows, write_log
from trainer.analysis import lookups
from trainer.analysis.lookups import NEVER, lookups_of
from trainer.config.sections import DataConfig
from trainer.log.schema import read_manifest

ROWS = enrich(random_rows(4, Shape(users=20)), 4)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    more = {"tasks": ["click", "buy"]}
    return write_log(
        tmp_path_factory.mktemp("lookups") / "log",
        {"train": ROWS},
        rich=True,
        context=CONTEXT,
        numeric=["price"],
        weighted=True,
        **more,
    )


def as_list(ids: int | list[int]) -> list[int]:
    return ids if isinstance(ids, list) else [ids]


def plain(rows: list[Row], feature: str, length: int, delay: int) -> list[tuple[int, int]]:
    """(id, time) of everything that counts, row by row."""
    found: list[tuple[int, int]] = []
    for row in rows:
        times, held = row["history_timestamp"], set[int]()
        for time, end in zip(row["request_timestamp"], row["request_history_end"], strict=True):
            seen = [each for each in times[:end] if not delay or each < time - delay]
            held |= set(range(max(0, len(seen) - length), len(seen)))
        for place in sorted(held) if f"history_{feature}" in row else ():
            found += [(each, times[place]) for each in as_list(row[f"history_{feature}"][place])]
        for request, time in enumerate(row["request_timestamp"]):
            for ids in row.get(f"candidate_{feature}", {request: []})[request]:
                found += [(each, time) for each in as_list(ids)]
            if f"context_{feature}" in row:
                found += [(each, time) for each in as_list(row[f"context_{feature}"][request])]
    return found


@pytest.mark.parametrize("feature", ["item_id", "tags", "action", "band", "city", "segments"])
@pytest.mark.parametrize(("length", "delay"), [(1000, 0), (6, 0), (6, 20)])
def test_counts_and_last_sightings_are_those_of_a_loop(
    log: Path, feature: str, length: int, delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookups, "_AT_ONCE", 50)
    config = DataConfig(log=log, history_length=length, ingestion_delay=delay)
    rows = (RICH | CONTEXT)[feature].rows + 3
    found = lookups_of(config, read_manifest(log), feature, rows, most=10**9)
    count, last = np.zeros(rows, dtype=np.int64), np.full(rows, NEVER)
    for each, time in plain(ROWS, feature, length, delay):
        count[each] += 1
        last[each] = max(last[each], time)
    assert np.array_equal(found.count, count) and np.array_equal(found.last, last)
    assert found.newest == max(max(row["request_timestamp"]) for row in ROWS) and found.complete
    assert (found.last[-3:] == NEVER).all()


def test_of_a_large_split_whole_row_groups_are_read(log: Path) -> None:
    config, manifest = DataConfig(log=log), read_manifest(log)
    whole = lookups_of(config, manifest, "item_id", 60, most=10**9)
    size = manifest.splits["train"].behaviors + manifest.splits["train"].candidates
    part, again = (lookups_of(config, manifest, "item_id", 60, most=size // 2) for _ in range(2))
    assert 0 < part.read < 1 and not part.complete
    assert (part.count <= whole.count).all() and part.count.sum() < whole.count.sum()
    assert np.array_equal(part.count, again.count)


def test_an_id_outside_of_the_table_is_an_error(log: Path) -> None:
    with pytest.raises(DataError, match="outside the table of 5 rows"):
        lookups_of(DataConfig(log=log), read_manifest(log), "item_id", 5, most=10**9)
