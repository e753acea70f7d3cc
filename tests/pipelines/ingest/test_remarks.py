"""What an ingest says of its tables: columns in vain, rows that are there twice, labels told by a column."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import DataError
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import DAY, EVENT, SHOWN, START, Row, config, events, impressions, write
from trainer.log.schema import LogManifest

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def made(folder: Path, raw: list[Row], shown: list[Row], **changes: Any) -> LogManifest:
    source, given = write(folder / "e.parquet", raw), write(folder / "i.parquet", shown, SHOWN)
    return ingest(source, folder / "log", config("impressions", **changes), impressions=given, overwrite=True)


def once(shown: list[Row]) -> list[Row]:
    """Without equal items in one request."""
    return list({(row["user_id"], row["request"], row["item_id"]): row for row in shown}.values())


@pytest.mark.parametrize("buckets", [1, 3])
def test_rows_that_are_there_twice_are_counted(buckets: int, tmp_path: Path) -> None:
    raw, shown = events(), once(impressions())
    first, second, third = shown[0], shown[7], shown[20]
    more = [
        first,  # the same again, twice
        first,
        {**second, "click": 1 - second["click"]},
        {**third, "item_id": 1999, "timestamp": third["timestamp"] + 5},  # its request has two times
    ]
    manifest = made(tmp_path, raw, shown + more, engine={"buckets": buckets})
    told = manifest.report["remarks"]
    keys = [
        tuple(
            str(row[name]) if name != "tags" else str(sorted({*(row[name] or [])} - {None})) for name in EVENT
        )
        for row in raw
    ]
    assert told["repeated_events"] == sum(count - 1 for count in Counter(keys).values()) > 0
    assert told["repeated_impressions"] == 3 and told["repeated_impressions_with_other_labels"] == 1
    pages = {(row["user_id"], row["request"]): set() for row in shown + more}
    for row in shown + more:
        pages[row["user_id"], row["request"]].add((row["timestamp"], row["page"]))
    assert told["requests_of_several_times_or_contexts"] == sum(len(one) > 1 for one in pages.values()) == 1
    users, items = ({row[name] for row in raw} for name in ("user_id", "item_id"))
    assert (
        told["impressions_of_users_without_events"]
        == sum(row["user_id"] not in users for row in shown + more)
        > 0
    )
    assert (
        told["impressions_of_items_without_events"]
        == sum(row["item_id"] not in items for row in shown + more)
        > 0
    )
    lines = report_lines(manifest)
    assert any(line.startswith("1 repeated impressions with other labels (") for line in lines)
    assert manifest.report["unused_settings"] == ["requests.negatives", "task"]
    clicks = sum(row["click"] for row in shown + more)
    assert f"label click: {clicks:,} of {len(shown) + 4:,} impressions are positive" in lines
    assert not any("WARNING" in line for line in lines)


def test_columns_that_nothing_uses_are_named(tmp_path: Path) -> None:
    manifest = made(
        tmp_path,
        events(),
        impressions(),
        features=[],
        context=[{"name": "page"}],
        impressions={"labels": {"click": "click"}, "request": "request", "numeric": ["price"]},
    )
    lines = report_lines(manifest)
    assert "raw events: nothing uses the columns action, tags, city" in lines
    assert "impressions: nothing uses the columns buy, slot" in lines


def test_settings_that_a_protocol_has_no_use_for_are_named(tmp_path: Path) -> None:
    settings = config(
        "time-split",
        requests={"min_history": 1, "distances": [3], "positives": 2, "exclude": "user"},
        impressions={"domain": ""},
    )
    manifest = ingest(write(tmp_path / "e.parquet", events()), tmp_path / "log", settings)
    assert manifest.report["unused_settings"] == ["requests.positives", "requests.distances", "impressions"]
    line = "requests.distances: the protocol time-split does not use this setting"
    assert line in report_lines(manifest)


def test_splits_and_columns_without_anything_are_warned_of(tmp_path: Path) -> None:
    raw = [{**row, "action": None} for row in events()]
    split = {"validation": "2017-01-06", "test": "2019-01-09"}
    manifest = made(tmp_path, raw, [{**row, "buy": False} for row in impressions()], split=split)
    lines = report_lines(manifest)
    last = max(row["timestamp"] for row in impressions()) - START - 9 * DAY
    span = f"from 2017-01-01 00:00:00 to 2017-01-10 00:00:0{last} UTC"
    assert f"impressions are {span}" in lines
    assert f"WARNING: split.test = 2019-01-09 lies outside of the impressions, which are {span}" in lines
    assert any(line.startswith("WARNING: the split test has no requests; ") for line in lines)
    assert "WARNING: action has no value in any row" in lines
    warned = [line.startswith("WARNING") for line in lines]
    assert sum(warned) >= 4 and warned == sorted(warned), "warnings come last, together"
    assert all(
        line.endswith(" positives of click") for line in lines if " requests " in line and " rows (" in line
    )
    assert not any(line.startswith("dropped: 0 ") for line in lines)
    assert 0 in manifest.report["dropped"].values()
    assert "WARNING: label buy has one class only: nothing can be learnt from it" in lines
    late = {"validation": "2016-12-01", "test": "2016-12-09"}
    with pytest.raises(
        DataError,
        match=r"e\.parquet and 1 more files: .*no event before split\.validation \(2016-12-01\), "
        "they are from 2017-",
    ):
        both = [write(tmp_path / name, raw) for name in ("e.parquet", "f.parquet")]
        ingest(both, tmp_path / "other", config("time-split", split=late))
    early = [{**row, "timestamp": row["timestamp"] - 1000 * DAY} for row in impressions()]
    with pytest.raises(DataError, match=r"\(the events are from 2017-.*, the impressions from 2014-"):
        made(tmp_path, raw, early)


def told(seed: int, users: int = 60) -> list[Row]:
    """Impressions with columns that hold their label, and with some that look like it."""
    random, found = Random(seed), []
    for user in range(1, users + 1):
        for request in range(8):
            for item in range(4):
                click = random.random() < 0.3
                found.append(
                    {
                        "user_id": user,
                        "item_id": random.randint(1001, 1030),
                        "request": request,
                        "timestamp": START + random.randint(1, 4) * DAY
                        if item == 0
                        else found[-1]["timestamp"],
                        "click": int(click),
                        "answer": "yes" if click else random.choice(["no", "none"]),
                        "answers": ["b", "a"] if click else ["b"],
                        "dwell": random.uniform(2, 9) if click else random.uniform(0, 1.9),
                        "unlike": -random.uniform(2, 9) if click else random.uniform(0, 1.9),
                        "hint": click if random.random() < 0.9 else not click,  # strong, and honest
                        "serial": len(found),  # a value of its own for each row
                        "session": user * 100 + request,
                    }
                )
    return found


def test_a_column_that_holds_the_label_is_warned_of(tmp_path: Path) -> None:
    shown = told(1)
    table = pa.Table.from_pylist(shown)
    pq.write_table(table, tmp_path / "i.parquet")
    raw = [{**row, "answer": "no", "answers": [], "serial": 1, "hint2": 0} for row in events(users=60)]
    pq.write_table(pa.Table.from_pylist(raw).drop_columns(["tags", "city"]), tmp_path / "e.parquet")
    plan = config(
        "impressions",
        features=[
            {"name": "answer"},
            {"name": "answers", "multi": True, "side": "candidate"},
            {"name": "serial", "side": "candidate"},
        ],
        context=[{"name": "session"}],
        impressions={
            "labels": {"click": "click"},
            "request": "request",
            "weight": "",
            "numeric": ["dwell", "unlike", "hint"],
        },
    )
    manifest = ingest(tmp_path / "e.parquet", tmp_path / "log", plan, impressions=tmp_path / "i.parquet")
    names = [one["column"] for one in manifest.report["predicts_alone"]]
    assert names == ["answer", "answers", "dwell", "unlike"]
    warned = [line for line in report_lines(manifest) if "alone predicts the label click" in line]
    assert len(warned) == 4 and warned[0].startswith("WARNING: answer alone") and "(AUC 1.0000)" in warned[0]
    assert 'give it side = "history", or leave it out' in warned[0]


def test_a_request_that_tells_its_label_is_warned_of(tmp_path: Path) -> None:
    shown = told(2)
    # All candidates of a request have one label here, and the page knows it.
    click = {(row["user_id"], row["request"]): row["click"] for row in shown}
    shown = [{**row, "click": click[row["user_id"], row["request"]]} for row in shown]
    shown = [{**row, "page": "thanks" if row["click"] else "list"} for row in shown]
    pq.write_table(pa.Table.from_pylist(shown), tmp_path / "i.parquet")
    plan = config(
        "impressions",
        features=[],
        context=[{"name": "page"}, {"name": "session"}],
        impressions={"labels": {"click": "click"}, "request": "request", "weight": "", "numeric": []},
    )
    source = write(tmp_path / "e.parquet", events(users=60))
    manifest = ingest(source, tmp_path / "log", plan, impressions=tmp_path / "i.parquet")
    assert manifest.report["predicts_alone"] == [{"column": "context_page", "task": "click", "auc": 1.0}]
    assert any(line.startswith("WARNING: context page alone predicts") for line in report_lines(manifest))


def test_baskets_whose_id_is_used_again_are_told(tmp_path: Path) -> None:
    again = [{**row, "basket": place % 3} for place, row in enumerate(events())]
    longest: dict[tuple[int, int], list[int]] = {}
    for row in again:
        longest.setdefault((row["user_id"], row["basket"]), []).append(row["timestamp"])
    expected = sum(max(times) - min(times) > DAY for times in longest.values())
    source = write(tmp_path / "e.parquet", again, (*EVENT, "basket"))
    made_of = config("next-basket", events={"request": "basket"}, engine={"buckets": 3})
    manifest = ingest(source, tmp_path / "log", made_of)
    assert manifest.report["remarks"]["baskets_longer_than_a_day"] == expected > 0
    said = f"{expected} baskets longer than a day (the first time counts; an id that is used again is one"
    assert any(line.startswith(said) for line in report_lines(manifest))
