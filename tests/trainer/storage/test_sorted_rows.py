"""Rows sorted in runs on disk are those that a sort in memory gives."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.storage import sorted_rows
from trainer.storage.sorted_rows import KEY, Rows, sort_rows


@settings(deadline=None, max_examples=100)
@given(
    parts=st.lists(st.lists(st.integers(-5, 5) | st.integers(-(2**62), 2**62), max_size=9), max_size=9),
    run=st.integers(1, 12),
    every=st.integers(1, 5),
    unsigned=st.booleans(),
)
def test_runs_are_merged_into_one_order(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[int]], run: int, every: int, unsigned: bool
) -> None:
    folder, of_key = tmp_path_factory.mktemp("rows"), np.uint64 if unsigned else np.int64
    keys = np.array([key for part in parts for key in part], dtype=np.int64).astype(of_key)
    numbers, count = np.arange(keys.size), 0
    rows: list[Rows] = []
    for part in parts:
        rows.append({KEY: keys[count : count + len(part)], "number": numbers[count : count + len(part)]})
        count += len(part)
    with patch.object(sorted_rows, "_RUN", run), patch.object(sorted_rows, "_EVERY", every):
        found = sort_rows(iter(rows), {KEY: of_key, "number": np.uint32}, lambda: folder)
        other = tmp_path_factory.mktemp("firsts")
        firsts = sort_rows(iter(rows), {KEY: of_key, "number": np.uint32}, lambda: other, _first)
    order = np.argsort(keys, kind="stable")
    assert found[KEY].tolist() == keys[order].tolist() and found["number"].tolist() == order.tolist()
    assert firsts[KEY].tolist() == np.unique(keys).tolist()
    assert firsts["number"].tolist() == np.unique(keys, return_index=True)[1].tolist()
    assert found[KEY].dtype == of_key and found["number"].dtype == np.uint32
    # Of the runs nothing stays.
    assert {path.name for path in folder.iterdir()} <= {KEY, "number"}


def _first(rows: Rows) -> Rows:
    places = np.unique(rows[KEY], return_index=True)[1]
    return {name: values[places] for name, values in rows.items()}


def test_what_is_mapped_stays_when_its_file_is_deleted(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).permutation(5000)
    with patch.object(sorted_rows, "_RUN", 100):
        found = sort_rows([{KEY: keys}], {KEY: np.int64}, lambda: tmp_path)
    (tmp_path / KEY).unlink()
    assert found[KEY].tolist() == list(range(5000))
