"""Cross-domain trajectories against plain Python: one history, nothing shared, nothing guessed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.errors import ConfigError, DataError
from pipelines.ingest.config import load_ingest_config
from pipelines.ingest.ingest import IngestConfig, ingest
from tests.helpers.rawlogs import DAY, START, Row, domains, ids_of_values, rows

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
LEVELS = {
    "ads": {1: ("l1-a", "l2-a"), 2: ("l1-b", "l2-b")},
    "content": {1: ("l1-a", None), 3: ("l1-c", None)},
}


def plan(folder: Path, **changes: Any) -> IngestConfig:
    common = {
        "user": "uid",
        "item": "thing",
        "timestamp": "ts",
        "scenario": "scene",
        "action": "do",
        "key": "kind",
    }
    tree: dict[str, Any] = {
        "protocol": "time-split",
        "events": {"taxonomy": ["l1", "l2"]},
        "features": [{"name": "dwell", "side": "history"}],
        "domains": [
            {"name": "ads", "files": [f"{folder}/ads.parquet"], "mapping": f"{folder}/ads_map.csv", **common},
            {
                "name": "content",
                "files": [f"{folder}/content*.parquet"],
                "mapping": f"{folder}/content_map.csv",
                **common,
            },
        ],
        "requests": {"min_history": 1, "negatives": 1, "exclude": "request"},
        "split": {"validation": "2017-01-06", "test": "2017-01-09"},
        "engine": {"threads": 2, "memory_limit": "500MB"},
    }
    return IngestConfig.model_validate(tree | changes)


def write(folder: Path, ads: list[Row], content: list[Row]) -> None:
    half = len(content) // 2
    # The content domain does not know the column `dwell`.
    parts = {"ads": ads, "content0": content[:half], "content1": content[half:]}
    for name, part in parts.items():
        table = pa.Table.from_pylist(part)
        pq.write_table(table if name == "ads" else table.drop_columns(["dwell"]), folder / f"{name}.parquet")
    (folder / "ads_map.csv").write_text("kind,l1,l2\n1,l1-a,l2-a\n2,l1-b,l2-b\n")
    (folder / "content_map.csv").write_text("kind,l1\n1,l1-a\n3,l1-c\n")


def expected(ads: list[Row], content: list[Row], ids: dict[str, dict[Any, int]]) -> dict[int, Counter[Any]]:
    """user -> (time, domain, item, action) of the merged history, with what its other columns may be."""
    found: dict[int, Counter[Any]] = {}
    for user in {row["uid"] for row in ads + content}:
        theirs = {
            (
                row["ts"],
                ids["domain_id"][name],
                ids["item_id"][f"{name}/{row['thing']}"],
                ids["action_id"][row["do"]],
            )
            for name, part in (("ads", ads), ("content", content))
            for row in part
            if row["uid"] == user
        }
        found[user] = Counter(theirs)
    return found


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1000))
def test_domains_become_one_history(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("domains")
    ads, content = domains(seed)
    write(folder, ads, content)
    manifest = ingest(None, folder / "log", plan(folder), overwrite=True)
    ids = {name: ids_of_values(folder / "log", name) for name in manifest.features}
    assert set(ids["domain_id"]) == {"ads", "content"} and set(ids["l2_id"]) <= {"l2-a", "l2-b"}
    assert set(ids["scenario_id"]) == {"ads/feed", "content/feed", "content/video"}
    merged = expected(ads, content, ids)
    total = sum(sum(one.values()) for one in merged.values())
    assert manifest.report["events"] == total
    assert manifest.report["dropped"]["duplicate_events"] == len(ads) + len(content) - total
    for row in rows(folder / "log"):
        names = ("timestamp", "domain_id", "item_id", "action_id")
        history = list(zip(*(row[f"history_{name}"] for name in names), strict=True))
        past = {key for key in merged[row["user_id"]] if key[0] < max(row["request_timestamp"])}
        assert Counter(history) == Counter(past) and row["history_timestamp"] == sorted(
            row["history_timestamp"]
        )
        check_levels(row, ads, content, ids)


def check_levels(row: Row, ads: list[Row], content: list[Row], ids: dict[str, dict[Any, int]]) -> None:
    """Every behavior is one row of its source, with the levels of that row's category and no others."""
    names = ("timestamp", "item_id", "action_id", "l1_id", "l2_id", "scenario_id", "dwell")
    possible = set()
    for name, part in (("ads", ads), ("content", content)):
        for event in part:
            first, second = LEVELS[name].get(event["kind"], (None, None))
            scene = f"{name}/{event['scene']}" if event["scene"] else None
            item = ids["item_id"][f"{name}/{event['thing']}"]
            codes = (
                ids["l1_id"].get(first, 0),
                ids["l2_id"].get(second, 0),
                ids["scenario_id"].get(scene, 0),
            )
            dwell = ids["dwell"][str(event["dwell"])] if name == "ads" else 0
            possible.add((event["ts"], item, ids["action_id"][event["do"]], *codes, dwell))
    assert set(zip(*(row[f"history_{name}"] for name in names), strict=True)) <= possible


def test_impressions_name_their_domain(tmp_path: Path) -> None:
    ads, content = domains(1)
    write(tmp_path, ads, content)
    shown = [
        {"user_id": 1, "item_id": thing, "timestamp": START + 9 * DAY, "click": 1} for thing in (1, 2, 77)
    ]
    pq.write_table(pa.Table.from_pylist(shown), tmp_path / "shown.parquet")
    settings_ = plan(tmp_path, protocol="impressions", impressions={"domain": "ads"})
    ingest(None, tmp_path / "log", settings_, impressions=tmp_path / "shown.parquet")
    ids = ids_of_values(tmp_path / "log", "item_id")
    (row,) = rows(tmp_path / "log")
    assert sorted(row["candidate_item_id"][0]) == sorted(ids[f"ads/{thing}"] for thing in (1, 2, 77))
    domain = ids_of_values(tmp_path / "log", "domain_id")["ads"]
    # Nobody had item 77, but whose it is is known.
    assert row["candidate_domain_id"] == [[domain] * 3]
    with pytest.raises(ValueError, match=r"impressions\.domain must name one of the domains"):
        plan(tmp_path, protocol="impressions")


def test_bad_mappings_are_explained(tmp_path: Path) -> None:
    write(tmp_path, *domains())
    path = tmp_path / "ads_map.csv"
    for text, message in {
        "kind,l1\n1,a\n1,b\n": r"ads_map\.csv: column kind: explains '1' 2 times; leave one row",
        "kind,level\n1,a\n": r"ads_map\.csv: has none of the levels of events\.taxonomy \(l1, l2\)",
        "sort,l1\n1,a\n": r"column kind: no such column \(domains\.ads\.key\)",
    }.items():
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            ingest(None, tmp_path / "log", plan(tmp_path))
    with pytest.raises(ConfigError, match="leave --events out"):
        ingest(tmp_path / "ads.parquet", tmp_path / "log", plan(tmp_path))


def test_domains_are_declared_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[[domains]]\nname = "ads"\nfiles = ["a.parquet"]\nkey = "kind"\n')
    with pytest.raises(ConfigError, match="domain ads: give key and mapping together"):
        load_ingest_config(tmp_path / "c.toml")
