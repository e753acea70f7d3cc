"""Tables of items and of users beside the events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import DataError
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import EVENT, SHOWN, config, events, ids_of_values, impressions, rows, write

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
CATEGORY = {1000 + item: None if item % 5 == 0 else f"c{item % 4}" for item in range(1, 31)}
CITY = {user: ["Rome", "Oslo", None][user % 3] for user in range(1, 6)}
TAGS = {item: [["x"], ["y", "x"], []][item % 3] for item in CATEGORY}


def plan(folder: Path, protocol: str, **changes: Any) -> IngestConfig:
    side = {
        "item_table": {"files": [str(folder / "items?.parquet")], "item": "sku"},
        "user_table": {"files": [str(folder / "users.parquet")], "user": "uid"},
    }
    context = [{"name": "home", "column": "city", "table": "users"}]
    return config(protocol, context=context, **(side | changes))


def sources(folder: Path) -> tuple[Path, Path]:
    """Events and impressions without what the other tables say; these lack item 1030 and user 6."""
    plain = [name for name in EVENT if name not in ("category", "tags", "city")]
    items = [item for item in CATEGORY if item != 1030]
    for number, some in enumerate((items[::2], items[1::2])):
        table = {
            "sku": some,
            "category": [CATEGORY[item] for item in some],
            "tags": [TAGS[item] for item in some],
            "maker": some,
        }
        pq.write_table(pa.table(table), folder / f"items{number}.parquet")
    pq.write_table(pa.table({"uid": list(CITY), "city": list(CITY.values())}), folder / "users.parquet")
    return (
        write(folder / "events.parquet", events(), plain),
        write(folder / "shown.parquet", impressions(), SHOWN),
    )


@pytest.mark.parametrize("protocol", ["impressions", "time-split"])
def test_side_tables_say_what_the_events_would(protocol: str, tmp_path: Path) -> None:
    source, given = sources(tmp_path)
    shown = given if protocol == "impressions" else None
    manifest = ingest(source, tmp_path / "log", plan(tmp_path, protocol), impressions=shown)
    ids = {
        name: ids_of_values(tmp_path / "log", name)
        for name in ("item_id", "category_id", "tags", "context_home")
    }
    raw = {code: item for item, code in ids["item_id"].items()}
    found = rows(tmp_path / "log")
    for row in found:
        city = CITY.get(row["user_id"])
        assert set(row["context_home"]) == {ids["context_home"].get(city, 0)}
        candidates = [
            triple
            for request in zip(
                *(row[f"candidate_{name}"] for name in ("item_id", "category_id", "tags")), strict=True
            )
            for triple in zip(*request, strict=True)
        ]
        history = zip(row["history_item_id"], row["history_category_id"], row["history_tags"], strict=True)
        for item, category, tags in [*candidates, *history]:
            known = raw[item] in TAGS and raw[item] != 1030
            assert category == (ids["category_id"].get(CATEGORY[raw[item]], 0) if known else 0)
            assert tags == (sorted(ids["tags"][tag] for tag in TAGS[raw[item]]) if known else [])
    assert found
    assert manifest.report["remarks"]["items_that_the_item_table_lacks"] == 1
    assert manifest.report["remarks"]["users_that_the_user_table_lacks"] == (2 if shown else 1)
    assert "item table: nothing uses the column maker" in report_lines(manifest)
    if shown:
        # Items that neither the table nor an event has.
        assert {raw[i] for row in found for one in row["candidate_item_id"] for i in one} - CATEGORY.keys()


def test_side_tables_are_checked(tmp_path: Path) -> None:
    source, _ = sources(tmp_path)

    def fails(message: str, table: dict[str, Any], name: str = "items") -> None:
        changed = tmp_path / f"{name}_bad.parquet"
        pq.write_table(pa.table(table), changed)
        key = {"items": ("item_table", "item", "sku"), "users": ("user_table", "user", "uid")}[name]
        section, role, column = key
        settings = plan(tmp_path, "time-split", **{section: {"files": [str(changed)], role: column}})
        with pytest.raises(DataError, match=rf"{name}_bad\.parquet: {message}"):
            ingest(source, tmp_path / "log", settings)

    tags = pa.array([["x"], []])
    fails("column sku: has 7 2 times; leave one", {"sku": [7, 7], "category": ["a", "b"], "tags": tags})
    fails("column sku: null in 1 rows; remove", {"sku": [7, None], "category": ["a", "b"], "tags": tags})
    fails(
        "the item is string here and int64 in the events",
        {"sku": ["7", "8"], "category": ["a", "b"], "tags": tags},
    )
    fails("has no column of a feature of items .*category, tags", {"sku": [7]})
    fails(r"column sku: no such column \(item_table\.item\)", {"item": [7], "category": ["a"]})
    fails("column city: no such column", {"uid": [7]}, "users")
    fails("column uid: has 7 3 times", {"uid": [7, 7, 7], "city": ["a", "b", "c"]}, "users")


def test_side_tables_that_nothing_uses_are_refused() -> None:
    for message, changes in {
        "need each other": {"user_table": {"files": ["u.parquet"]}},
        r'table = "users" need each other': {"context": [{"name": "city", "table": "users"}]},
        "mapping tables say what items are": {
            "item_table": {"files": ["i.parquet"]},
            "domains": [{"name": "ads", "files": ["a.parquet"]}],
        },
    }.items():
        with pytest.raises(ValueError, match=message):
            config("time-split", **changes)
