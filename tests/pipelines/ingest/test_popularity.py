"""Negatives follow the popularity of the time before the request: each draw against plain Python."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ingest.engine import DuckEngine
from pipelines.ingest.ingest import ingest
from pipelines.ingest.protocols.negatives import past_events
from pipelines.ingest.remarks import unused_settings
from pipelines.ingest.sections import EngineConfig
from tests.helpers.rawlogs import DAY, Log, config, events, write

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DuckEngine]:
    found = DuckEngine(EngineConfig(threads=1), tmp_path_factory.mktemp("engine"))
    yield found
    found.close()


@settings(max_examples=15, deadline=None)
@given(
    happened=st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3), st.integers(1, 4)), min_size=1),
    days=st.sampled_from([0, 1, 2]),
)
def test_the_past_of_a_second_is_counted(
    engine: DuckEngine, happened: list[tuple[int, int, int]], days: int
) -> None:
    """Times lie near the edges of days and hours, several in one second; -3 is before 1970."""
    times = [day * DAY + second for day, second, _ in happened]
    items = [item for _, _, item in happened]
    cells = ", ".join(f"({time}::BIGINT, {item}::BIGINT)" for time, item in zip(times, items, strict=True))
    kinds = {"timestamp": "int64", "item_id": "int64"}
    query = f"SELECT * FROM (VALUES {cells}) AS some(timestamp, item_id)"
    table = engine.keep("some", engine.query(query, kinds))
    past = past_events(table, days)
    ordered = sorted(zip(times, items, strict=True))
    numbered = {(row["number"], row["item_id"]) for row in engine.rows(past.events)}
    assert numbered == {(number, item) for number, (_, item) in enumerate(ordered)}
    for row in engine.rows(past.seconds):
        time, begin = row["timestamp"], row["timestamp"] - days * DAY
        assert row["earlier"] == sum(one < time for one in times)
        assert row["gone"] == (sum(one < begin for one in times) if days else 0)
    assert sorted(row["timestamp"] for row in engine.rows(past.seconds)) == sorted(set(times))
    firsts = {row["item_id"]: row["since"] for row in engine.rows(past.items)}
    assert firsts == {item: min(t for t, one in ordered if one == item) for item in items}


def drawn(log: Log, user: int, request: int, time: int, wanted: int, refused: set[int]) -> set[int]:
    """The negatives of a request, one draw after the other."""
    ordered = sorted((event["timestamp"], event["item_id"]) for event in log.events)
    days = log.config.requests.popularity_days
    earlier = bisect_left(ordered, (time, -1))
    gone = bisect_left(ordered, (time - days * DAY, -1)) if days else 0
    found: list[int] = []
    for draw in range(wanted + wanted // 2 + 8) if earlier > gone else ():
        text = f"{log.config.seed}/negative/{user}/{request}/{draw}"
        number = gone + int(hashlib.md5(text.encode()).hexdigest()[:12], 16) % (earlier - gone)
        item = ordered[number][1]
        if item not in refused and item not in found:
            found.append(item)
    return set(found[:wanted])


@pytest.mark.parametrize(
    ("protocol", "days"), [("next-basket", 0), ("next-basket", 2), ("leave-last", 2), ("time-split", 1)]
)
def test_negatives_are_events_of_the_last_days(protocol: str, days: int, tmp_path: Path) -> None:
    asked = {"popularity_days": days, "exclude": "request", "min_events": 9, "min_history": 1}
    log = Log(tmp_path, protocol, 11, requests={**asked, "negatives": 2}, engine={"buckets": 2})
    some = 0
    for (user, request), one in log.requests().items():
        time, items = one["request_timestamp"], one["candidate_item_id"]
        positive = {item for item, label in zip(items, one["label_click"], strict=True) if label}
        theirs = [event for event in log.events if event["user_id"] == user]
        # `leave-last` refuses all items of the user, the others those of the second.
        beside = {e["item_id"] for e in theirs if protocol == "leave-last" or e["timestamp"] == time}
        negatives = drawn(log, user, request, time, 2 * len(positive), beside)
        assert set(items) - positive == negatives
        before = {e["item_id"] for e in log.events if e["timestamp"] < time}
        recent = {e["item_id"] for e in log.events if time - days * DAY <= e["timestamp"] < time}
        assert negatives <= (recent if days else before)
        some += recent < before and bool(negatives)
    assert some > 10 or not days


def test_without_recent_events_there_are_no_negatives_and_that_is_counted(tmp_path: Path) -> None:
    """No second of these events has another one within a day before it."""
    raw = [
        {**row, "timestamp": row["timestamp"] + 3 * DAY * place} for place, row in enumerate(events()[:30])
    ]
    source = write(tmp_path / "e.parquet", [{**row, "user_id": 1} for row in raw])
    asked = {"negatives": 2, "min_history": 1, "popularity_days": 1, "min_events": 9}
    manifest = ingest(source, tmp_path / "log", config("leave-last", requests=asked))
    positives = sum(info.positives for info in manifest.splits.values())
    assert sum(info.candidates for info in manifest.splits.values()) == positives > 0
    assert manifest.report["dropped"]["negatives_not_found"] == 2 * positives


@pytest.mark.parametrize("protocol", ["impressions", "next-basket", "leave-last", "time-split"])
def test_protocols_that_draw_have_use_for_it(protocol: str) -> None:
    plan = config(protocol, requests={"popularity_days": 3})
    assert ("requests.popularity_days" in unused_settings(plan)) is (protocol == "impressions")
