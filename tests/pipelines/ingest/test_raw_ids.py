"""Ids without a vocabulary: the integers of a column, or hashes of its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import DataError
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import Log, config, events, rows, write
from trainer.data.rows import Columns, read_rows
from trainer.log.hashed_ids import hash_text
from trainer.log.schema import VOCABULARIES, read_manifest

RAW: dict[str, Any] = {
    "events": {"taxonomy": ["category"], "item_ids": "raw", "taxonomy_ids": "hashed"},
    "features": [
        {"name": "action", "side": "history"},
        {"name": "tags", "multi": True, "ids": "hashed"},
    ],
    "context": [{"name": "city", "table": "events", "ids": "hashed"}],
}
SHOWN = {
    "features": [*RAW["features"], {"name": "slot", "side": "candidate", "ids": "hashed"}],
    "context": [*RAW["context"], {"name": "page", "ids": "hashed"}],
}


@pytest.mark.parametrize("protocol", ["impressions", "time-split"])
def test_values_become_the_ids_that_they_are(protocol: str, tmp_path: Path) -> None:
    """Items from -9 to 10, in several buckets: attributes and histories are those of the raw tables."""
    changes = RAW | SHOWN if protocol == "impressions" else RAW
    log = Log(tmp_path, protocol, 3, shift=-1010, **changes, engine={"buckets": 3, "threads": 2})
    log.check_histories()
    infos = log.manifest.features
    kinds = {name: (info.raw, info.hashed, info.rows == 1) for name, info in infos.items()}
    assert kinds["item_id"] == (True, False, True) and kinds["action"] == (False, False, False)
    assert kinds["tags"] == kinds["category_id"] == (True, True, True) and log.manifest.context["city"].hashed
    assert [file.name for file in (log.folder / VOCABULARIES).iterdir()] == ["action.parquet"]
    items = {item for row in log.rows for item in row["history_item_id"]}
    assert items and min(items) < 0 < max(items) and items <= set(range(-9, 15))
    told = "\n".join(report_lines(log.manifest))
    assert "item_id: raw ids, " in told and "tags: hashes of text, 3 different ones" in told
    assert "WARNING: item_id has the id 0 in" in told and "no value in any row" not in told
    for split in log.manifest.splits.values():  # the trainer reads it
        for file in split.files:
            read_rows(log.folder / file.path, 0, Columns.of(read_manifest(log.folder)))


def test_hashes_are_those_of_serving(tmp_path: Path) -> None:
    log = Log(tmp_path, "time-split", 3, **RAW)
    words = {f"c{number}" for number in range(4)}
    ids = {one for row in log.rows for one in row["history_category_id"]}
    assert ids - {0} <= set(hash_text(sorted(words)).tolist()) and len(ids) > 2


def test_a_later_log_has_the_same_ids_without_the_older_one(tmp_path: Path) -> None:
    """Dense features go on with the older vocabulary; the others need none."""
    plan = config("time-split", **RAW)
    source = write(tmp_path / "events.parquet", events(1))
    ingest(source, tmp_path / "old", plan)
    again = config("time-split", **RAW, vocabulary={"log": str(tmp_path / "old")})
    ingest(source, tmp_path / "new", again)
    assert rows(tmp_path / "new") == rows(tmp_path / "old") != []
    dense = config("time-split", vocabulary={"log": str(tmp_path / "old")})
    with pytest.raises(DataError, match="has raw ids of the feature 'item_id', this config dense ones"):
        ingest(source, tmp_path / "dense", dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"events": {"item_ids": "hashed"}},
            'item_id: holds integers which cannot be "hashed"; set ids = "raw"',
        ),
        (
            {"events": {"taxonomy": ["category"], "taxonomy_ids": "raw"}},
            'category_id: holds text, .* ids = "hashed"',
        ),
    ],
)
def test_ids_that_a_column_cannot_have_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "events.parquet", events(1))
    with pytest.raises(DataError, match=message):
        ingest(source, tmp_path / "log", config("time-split", **change))
    assert not (tmp_path / "log").exists()


def test_text_columns_may_be_hashed(tmp_path: Path) -> None:
    source = write(tmp_path / "events.parquet", events(1))
    plan = config("time-split", events={"item_ids": "hashed"}, text_columns=["item_id"])
    ingest(source, tmp_path / "log", plan)
    items = {item for row in rows(tmp_path / "log") for item in row["history_item_id"]}
    assert items <= set(hash_text([str(item) for item in range(1000, 1040)]).tolist())
