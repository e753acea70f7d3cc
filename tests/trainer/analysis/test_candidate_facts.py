"""Ages of newest behaviors and frequencies of items, against plain loops over the rows of a log."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.errors import DataError
from tests.helpers.logs import Row, Shape, random_rows, write_log
from trainer.analysis import candidate_facts
from trainer.analysis.candidate_facts import behavior_ages, item_frequency
from trainer.config.sections import DataConfig
from trainer.log.schema import read_manifest

TRAIN, TEST = random_rows(1, Shape(users=20)), random_rows(2, Shape(users=20))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("facts") / "log", {"train": TRAIN, "test": TEST})


def plain_age(row: Row, request: int, delay: int) -> float:
    """Seconds since the newest behavior that the request may see, one behavior after another."""
    time = row["request_timestamp"][request]
    seen = row["history_timestamp"][: row["request_history_end"][request]]
    seen = [each for each in seen if each < time - delay] if delay else seen
    return float(time - seen[-1]) if seen else math.nan


@pytest.mark.parametrize("delay", [0, 15])
@pytest.mark.parametrize("users", [range(20), (3, 4, 17), (5,)])
def test_ages_are_those_of_a_loop(log: Path, delay: int, users: Any) -> None:
    asked = [(user, place) for user in users for place in range(len(TEST[user]["request_id"]))] * 2
    expected = [plain_age(TEST[user], place, delay) for user, place in asked]
    names = np.array([TEST[user]["request_id"][place] for user, place in asked])
    config = DataConfig(log=log, ingestion_delay=delay)
    found = behavior_ages(config, read_manifest(log), "test", np.array([user for user, _ in asked]), names)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.isnan(found).any() or len(users) < 20


def test_a_request_that_the_log_does_not_have_has_no_age(log: Path) -> None:
    config = DataConfig(log=log)
    found = behavior_ages(config, read_manifest(log), "test", np.array([2, 999]), np.array([5, 5]))
    assert np.isnan(found).all()


def test_row_groups_without_a_wanted_user_are_not_decoded(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three users a row group: two users of one group open one of seven."""
    opened: list[int] = []
    read_rows = candidate_facts.read_rows

    def counted(file: Path, row_group: int, *rest: Any) -> Any:
        opened.append(row_group)
        return read_rows(file, row_group, *rest)

    monkeypatch.setattr(candidate_facts, "read_rows", counted)
    config, names = DataConfig(log=log), np.array([6000, 7000])
    found = behavior_ages(config, read_manifest(log), "test", np.array([6, 7]), names)
    assert len(opened) == 1 and found.size == 2


def test_frequencies_are_those_of_a_loop(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [item for row in TRAIN for request in row["candidate_item_id"] for item in request]
    items = np.array([5, 59, 5, 1000, 0, -3])
    config, manifest = DataConfig(log=log), read_manifest(log)
    assert item_frequency(config, manifest, items).tolist() == [every.count(item) for item in items]
    assert every.count(5) > 0
    monkeypatch.setattr(candidate_facts, "_MOST", 3)
    with pytest.raises(DataError, match="items are counted in up to 3"):
        item_frequency(config, manifest, items)
