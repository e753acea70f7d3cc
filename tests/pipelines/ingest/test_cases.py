"""Raw tables that strangers brought, kept in cases/ beside it: each once made a wrong log without a word."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import DataError
from pipelines.ingest.config import load_ingest_config
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import ids_of_values, rows
from trainer.log.schema import LogManifest

CASES = Path(__file__).parent / "cases"


def made(out: Path, events: str, config: str, impressions: Path | None = None) -> LogManifest:
    settings = load_ingest_config(CASES / config, ["engine.threads=1"])
    return ingest(CASES / events, out, settings, impressions=impressions)


def table(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(CASES / name).to_pylist()
    return found


def test_labels_of_csv_are_those_of_parquet(tmp_path: Path) -> None:
    with (CASES / "integer_labels.csv").open(newline="") as file:
        columns = list(zip(*csv.reader(file), strict=True))
    parquet = tmp_path / "labels.parquet"
    pq.write_table(pa.table({name: list(map(int, cells)) for name, *cells in columns}), parquet)
    made(tmp_path / "csv", "base.parquet", "one_label.toml", CASES / "integer_labels.csv")
    made(tmp_path / "parquet", "base.parquet", "one_label.toml", parquet)
    assert rows(tmp_path / "csv") == rows(tmp_path / "parquet") != []


def test_ratings_are_no_binary_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"ratings\.parquet: column click: holds 1 to 5.*positive_from"):
        made(tmp_path / "log", "base.parquet", "one_label.toml", CASES / "ratings.parquet")


def test_ids_with_leading_zeros_stay_apart(tmp_path: Path) -> None:
    with (CASES / "leading_zeros.csv").open(newline="") as file:
        spelled = {row["item_id"] for row in csv.DictReader(file)}
    made(tmp_path / "log", "leading_zeros.csv", "time_split.toml")
    assert ids_of_values(tmp_path / "log", "item_id").keys() == spelled
    assert len(spelled) == 40 > len({int(item) for item in spelled})


def test_a_candidate_has_the_category_that_was_known(tmp_path: Path) -> None:
    history = defaultdict(list)
    for row in table("cat_changes.parquet"):
        history[row["item_id"]].append((row["timestamp"], row["category"]))
    manifest = made(tmp_path / "log", "cat_changes.parquet", "time_split.toml")
    assert manifest.report["changing_items"] == {"category_id": 40}
    items = {number: item for item, number in ids_of_values(tmp_path / "log", "item_id").items()}
    categories = ids_of_values(tmp_path / "log", "category_id")
    checked = 0
    for row in rows(tmp_path / "log"):
        for time, offered, theirs in zip(
            row["request_timestamp"], row["candidate_item_id"], row["candidate_category_id"], strict=True
        ):
            for item, category in zip(offered, theirs, strict=True):
                known = [one for one in history[items[item]] if one[0] < time]
                assert category == (categories[max(known)[1]] if known else 0)
                checked += 1
    assert checked == sum(info.candidates for info in manifest.splits.values())


def test_both_labels_and_the_context_arrive(tmp_path: Path) -> None:
    manifest = made(tmp_path / "log", "base.parquet", "two_labels.toml", CASES / "two_tasks.parquet")
    assert manifest.tasks == ["click", "buy"] and manifest.context["gender"].rows == 3
    raw = table("two_tasks.parquet")
    lines = report_lines(manifest)
    # In this table every item is always bought or never.
    assert any(line.startswith("WARNING: the item alone tells the label buy (AUC 1.0") for line in lines)
    for task in manifest.tasks:
        positives = sum(row[task] for row in raw)
        assert f"label {task}: {positives:,} of {len(raw):,} impressions are positive" in lines


def test_all_tags_of_an_item_arrive(tmp_path: Path) -> None:
    manifest = made(tmp_path / "log", "tags.parquet", "tags.toml")
    assert manifest.features["tags"].multi
    raw = {(row["user_id"], row["item_id"], row["timestamp"]): row["tags"] for row in table("tags.parquet")}
    items = {number: item for item, number in ids_of_values(tmp_path / "log", "item_id").items()}
    tags = {number: tag for tag, number in ids_of_values(tmp_path / "log", "tags").items()}
    seen = 0
    for row in rows(tmp_path / "log"):
        for item, time, ids in zip(
            row["history_item_id"], row["history_timestamp"], row["history_tags"], strict=True
        ):
            assert {tags[number] for number in ids} == set(raw[row["user_id"], items[item], time])
            seen += len(ids)
    assert seen > 1_000
