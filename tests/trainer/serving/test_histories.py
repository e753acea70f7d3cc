"""Stored histories: found in the log when they are asked for, the same as if all of it were in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.logs import Shape, enrich, random_rows, write_log
from trainer.data import files
from trainer.data.files import RowGroup
from trainer.serving import histories
from trainer.serving.histories import HistoryStore
from trainer.serving.request import RequestError
from trainer.storage import place, sorted_rows

SPLITS = ("train", "validation", "test")
Row = dict[str, Any]


def splits_of(seed: int, rich: bool = False) -> dict[str, list[Row]]:
    """The same users in several splits, in another order in each, some of them in one alone."""
    rng, splits = np.random.default_rng(seed), {}
    for number, split in enumerate(SPLITS[: int(rng.integers(1, 4))]):
        rows = random_rows(seed + 100 * number, Shape(users=int(rng.integers(1, 14))))
        rows = enrich(rows, seed) if rich else rows
        splits[split] = [rows[at] for at in rng.permutation(len(rows))]
    return splits


def longest(splits: dict[str, list[Row]]) -> dict[int, Row]:
    """The slow way: every user's longest row; of rows that are equally long, the last one."""
    found: dict[int, Row] = {}
    for row in (row for split in SPLITS for row in splits.get(split, [])):
        before = found.get(row["user_id"])
        if before is None or row["num_behaviors"] >= before["num_behaviors"]:
            found[row["user_id"]] = row
    return found


@pytest.mark.parametrize(("cached", "run"), [(1, 5), (256 << 20, 1 << 22)])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), rich=st.booleans())
def test_histories_are_those_of_the_log(
    tmp_path_factory: pytest.TempPathFactory, cached: int, run: int, seed: int, rich: bool
) -> None:
    """Where users lie is in memory, or in files of a cache that are mapped and leave nothing behind."""
    splits, folder = splits_of(seed, rich), tmp_path_factory.mktemp("log")
    log = write_log(folder / "log", splits, rich=rich)
    with patch.object(sorted_rows, "_RUN", run):
        store, wanted = HistoryStore(log, cached, folder / "cache"), longest(splits)
    assert (folder / "cache").is_dir() == (sum(map(len, splits.values())) >= run)
    assert not list((folder / "cache").glob("*"))
    assert list(store) == sorted(wanted) == store.first(99) and len(store) == len(wanted)
    assert 1_000_000 not in store and -1 not in store and (1 << 70) not in store
    for user in np.random.default_rng(seed).permutation(sorted(wanted)).tolist():
        row, found = wanted[user], store[user]
        assert user in store and store.behaviors(user) == row["num_behaviors"]
        assert found.time.tolist() == row["history_timestamp"]
        for name, bags in found.features.items():
            values = row[f"history_{name}"]
            ids, lengths = bags.select(slice(0, bags.size))
            flat = values if bags.offsets is None else [one for bag in values for one in bag]
            assert ids.tolist() == flat and bags.size == len(values) == lengths.size
        rows, requests = store.requests(user)
        assert rows.request_time[requests].tolist() == row["request_timestamp"]
        held = [histories._bytes_of(rows) for rows in store._cache._rows.values()]
        assert store._cache._held == sum(held) and (len(held) == 1 or sum(held) <= cached)
    with pytest.raises(KeyError):
        store[1_000_000]


def test_a_start_reads_no_more_than_where_users_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding a log took 24 s where it had 200,000 users."""
    log = write_log(tmp_path / "log", {"train": random_rows(1)})
    read: list[Any] = []
    decode = histories.read_rows
    monkeypatch.setattr(histories, "read_rows", lambda *given: (read.append(given), decode(*given))[1])
    store = HistoryStore(log)
    users = list(store)
    assert not read
    for user in (users[0], users[0]):
        store[user]
    assert len(read) == 1
    # Of histories alone: no candidate, no label.
    assert not [name for name in read[0][2].names() if name.startswith(("candidate_", "label_"))]


def test_what_cannot_be_read_any_more_is_no_fault_of_the_request(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(1)})
    store = HistoryStore(log)
    for file in (log / "train").iterdir():
        file.unlink()
    with pytest.raises(RequestError, match=r"the stored histories cannot be read: .*no such file") as caught:
        store[next(iter(store))]
    assert caught.value.status == 503


@pytest.mark.parametrize("kept", [0, 64 << 20])
def test_names_of_a_large_vocabulary_come_from_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(1)})
    table = pa.table({"value": [f"n{n}" for n in range(1, 101)], "id": range(1, 101)})
    pq.write_table(table, log / "vocab" / "item_id.parquet", row_group_size=7)
    monkeypatch.setattr(histories, "_KEPT_NAMES", kept)
    store = HistoryStore(log)
    assert store.names("item_id", [100, 7, 8, 7, 0, 101]) == {7: "n7", 8: "n8", 100: "n100"}
    assert store.names("category_id", [1]) == {}
    assert (not kept) == (not store._names.get("item_id"))


def test_names_of_a_large_vocabulary_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")
    log, there = write_log(tmp_path / "log", {"train": random_rows(1)}), place("memory://logs/names")
    table = pa.table({"value": [f"n{n}" for n in range(1, 101)], "id": range(1, 101)})
    pq.write_table(table, log / "vocab" / "item_id.parquet", row_group_size=7)
    for file in log.rglob("*.*"):
        (there / str(file.relative_to(log))).write_bytes(file.read_bytes())
    monkeypatch.setattr(histories, "_KEPT_NAMES", 0)
    assert HistoryStore(there).names("item_id", [100, 7, 101]) == {7: "n7", 100: "n100"}


def test_row_groups_are_not_all_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else those that wait to be sorted would be in memory, as many as there are."""
    read: list[int] = []
    waiting: list[int] = []

    def lengths(footer: Any, place: RowGroup) -> tuple[Any, Any]:
        read.append(place.row_group)
        return np.array([place.row_group]), np.array([7])

    def placed(number: int, *found: Any) -> Any:
        waiting.append(len(read) - number)
        return before(number, *found)

    before = histories._placed
    monkeypatch.setattr(histories, "_lengths", lengths)
    monkeypatch.setattr(histories, "_placed", placed)
    monkeypatch.setattr(files, "_AHEAD", 3)
    index = histories._Index.of([RowGroup(tmp_path, number) for number in range(20)], None)
    assert index.user.tolist() == index.group.tolist() == list(range(20))
    assert len(waiting) == 20 and max(waiting) <= 3
