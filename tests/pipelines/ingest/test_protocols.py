"""Every protocol against plain Python on small tables full of ties, repetitions and nulls."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.errors import ConfigError, DataError
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import (
    BEHAVIOR,
    DAY,
    EVENT,
    SHOWN,
    START,
    Log,
    Row,
    as_parquet,
    config,
    events,
    ids_of_values,
    impressions,
    rows,
    write,
)
from trainer.log.schema import LogManifest, schema_of

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
SEEDS = st.integers(0, 10_000)


def ordered(log: Log, user: int) -> list[Row]:
    """The user's events in the order of the history."""

    def key(event: Row) -> tuple[Any, ...]:
        text = f"{log.config.seed}/tie/{user}/{event['timestamp']}/{event['item_id']}"
        tie = hashlib.md5(text.encode()).hexdigest()
        return (event["timestamp"], tie, *(event[name] for name in BEHAVIOR[:-1]))

    return sorted((event for event in log.events if event["user_id"] == user), key=key)


def split_of(time: int) -> str:
    return "train" if time < START + 5 * DAY else "validation" if time < START + 8 * DAY else "test"


def check_one_positive(log: Log, expected: dict[tuple[int, int], Row], never: str = "user") -> None:
    found = log.requests()
    assert found.keys() == expected.keys()
    missing = 0
    for (user, place), request in found.items():
        target = expected[user, place]
        assert request["request_timestamp"] == target["timestamp"]
        items, labels = request["candidate_item_id"], request["label_click"]
        assert [item for item, label in zip(items, labels, strict=True) if label] == [target["item_id"]]
        theirs = {event["item_id"] for event in log.events if event["user_id"] == user}
        if never == "request":
            same = [e for e in log.events if (e["user_id"], e["timestamp"]) == (user, target["timestamp"])]
            theirs = {event["item_id"] for event in same}
        others = [item for item, label in zip(items, labels, strict=True) if not label]
        assert len(others) == len(set(others)) <= 2 and not theirs.intersection(others)
        assert {e["item_id"] for e in log.events if e["timestamp"] < target["timestamp"]}.issuperset(others)
        missing += 2 - len(others)
    # A user who touched nearly everything gets fewer; the report says how many in all.
    assert missing == log.manifest.report["dropped"]["negatives_not_found"]
    assert [key for split in ("train", "validation", "test") for key in places(log, split)] == list(found)
    log.check_histories()


def places(log: Log, split: str) -> list[tuple[int, int]]:
    return [(row["user_id"], request) for row in rows(log.folder, split) for request in row["request_id"]]


@settings(max_examples=3, deadline=None)
@given(seed=SEEDS)
def test_leave_last_asks_at_fixed_distances(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    log = Log(tmp_path_factory.mktemp("log"), "leave-last", seed, requests={"min_events": 9})
    expected: dict[str, dict[tuple[int, int], Row]] = defaultdict(dict)
    for user in {event["user_id"] for event in log.events}:
        theirs = ordered(log, user)
        if len(theirs) < 9:
            continue
        for distance, split in ((1, "test"), (2, "validation"), (3, "train"), (8, "train")):
            place = len(theirs) - distance
            if log.before(user, theirs[place]["timestamp"]):
                expected[split][user, place] = theirs[place]
    for split, targets in expected.items():
        assert set(places(log, split)) == set(targets)
    check_one_positive(log, {key: one for part in expected.values() for key, one in part.items()})


@settings(max_examples=3, deadline=None)
@given(seed=SEEDS, exclude=st.sampled_from(["user", "request"]))
def test_time_split_asks_at_every_event(
    seed: int, exclude: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("log")
    log = Log(folder, "time-split", seed, requests={"exclude": exclude, "min_history": 2})
    expected = {
        (user, place): event
        for user in {event["user_id"] for event in log.events}
        for place, event in enumerate(ordered(log, user))
        if len(log.before(user, event["timestamp"])) >= 2
    }
    for split in ("train", "validation", "test"):
        assert all(split_of(expected[key]["timestamp"]) == split for key in places(log, split))
    check_one_positive(log, expected, exclude)


def test_time_split_keeps_some_requests_of_a_user(tmp_path: Path) -> None:
    full = Log(tmp_path, "time-split", 1)
    every = {split: places(full, split) for split in ("train", "validation", "test")}
    few = Log(tmp_path, "time-split", 1, requests={"per_user": 2})
    for split, keys in every.items():
        kept = places(few, split)
        theirs = Counter(user for user, _ in keys)
        assert set(kept) <= set(keys)
        assert Counter(user for user, _ in kept) == {user: min(2, count) for user, count in theirs.items()}
    left = sum(map(len, every.values())) - sum(len(places(few, split)) for split in every)
    assert few.manifest.report["dropped"]["requests_over_per_user"] == left > 0


@settings(max_examples=3, deadline=None)
@given(seed=SEEDS, layout=st.sampled_from(["user", "request"]))
def test_impressions_are_written_as_they_were(
    seed: int, layout: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = Log(tmp_path_factory.mktemp("log"), "impressions", seed, files={"layout": layout})
    expected: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in log.shown:
        if log.before(row["user_id"], row["timestamp"]):
            expected[row["user_id"], row["request"]].append(row)
    found = log.requests()
    assert found.keys() == expected.keys()
    for key, request in found.items():
        assert request["context_page"] == max(row["context_page"] for row in expected[key])
        names = ("candidate_item_id", "candidate_slot", "label_click", "label_buy", "numeric_price", "weight")
        candidates = Counter(zip(*(request[name] for name in names), strict=True))
        source = ("item_id", "slot", "click", "buy", "price", "importance")
        assert candidates == Counter(tuple(row[name] for name in source) for row in expected[key])
    log.check_histories()
    assert log.manifest.tasks == ["click", "buy"] and log.manifest.weighted
    assert (log.manifest.numeric, list(log.manifest.context)) == (["price"], ["city", "page"])
    assert {name: info.side for name, info in log.manifest.features.items()} == {
        "item_id": "both",
        "category_id": "both",
        "action": "history",
        "tags": "both",
        "slot": "candidate",
    }
    assert set(log.rows[0]) == set(schema_of(log.manifest).names)


def test_impressions_may_carry_item_attributes_of_their_own(tmp_path: Path) -> None:
    shown = [{**row, "category": "new"} for row in impressions()]
    given = write(tmp_path / "i.parquet", shown, (*SHOWN, "category"))
    ingest(
        write(tmp_path / "e.parquet", events()), tmp_path / "log", config("impressions"), impressions=given
    )
    new = ids_of_values(tmp_path / "log", "category_id")["new"]
    categories = [one for row in rows(tmp_path / "log") for one in row["candidate_category_id"]]
    assert {code for one in categories for code in one} == {new}


def test_requests_without_history_can_be_kept(tmp_path: Path) -> None:
    given = write(tmp_path / "i.parquet", impressions(), SHOWN)
    for layout in ("user", "request"):
        changes = {"files": {"layout": layout}, "engine": {"buckets": 3}}
        plan = config("impressions", requests={"min_history": 0}, **changes)
        ingest(
            write(tmp_path / "e.parquet", events()), tmp_path / "log", plan, impressions=given, overwrite=True
        )
        found = rows(tmp_path / "log")
        assert {row["user_id"] for row in found} == set(range(1, 8))  # user 7 has no event
        first = next(row for row in found if row["user_id"] == 7)
        assert first["history_item_id"] == first["history_tags"] == [] and first["num_behaviors"] == 0
        assert set(first["request_history_end"]) == {0} and set(first["context_city"]) == {0}
        assert sum(row["num_requests"] for row in found) == 42


@pytest.mark.parametrize("order", ["time", "shuffle"])
def test_request_rows_have_the_newest_behaviors_in_order(order: str, tmp_path: Path) -> None:
    log = Log(tmp_path, "time-split", 3, files={"layout": "request", "max_history": 4, "order": order})
    log.check_histories()
    assert all(row["num_requests"] == 1 and row["num_behaviors"] <= 4 for row in log.rows)
    times = [[row["request_timestamp"][0] for row in rows(log.folder, split)] for split in ("train", "test")]
    assert all((one == sorted(one)) is (order == "time") for one in times)


@pytest.mark.parametrize(
    ("protocol", "files"),
    [
        ("leave-last", {}),
        ("time-split", {"layout": "request", "max_history": 5}),
        ("impressions", {"layout": "request", "order": "time"}),
    ],
)
def test_buckets_threads_and_row_order_change_nothing(
    protocol: str, files: dict[str, Any], tmp_path: Path
) -> None:
    shown = impressions()

    def made(out: str, rows_in: Sequence[Row], **engine: Any) -> LogManifest:
        given = write(tmp_path / "i.parquet", shown[:: engine["threads"] * 2 - 3], SHOWN)
        source = write(tmp_path / "e.parquet", rows_in)
        plan = config(protocol, files=files, engine=engine)
        used = given if protocol == "impressions" else None
        return ingest(source, tmp_path / out, plan, impressions=used)

    once = made("one", events(), threads=1, buckets=1)
    again = made("two", events()[::-1], threads=2, buckets=3)
    assert again.splits == once.splits and again.report == once.report


def test_several_files_and_csv_give_the_same_log(tmp_path: Path) -> None:
    raw = [{**row, "tags": "|".join(one for one in row["tags"] or [] if one)} for row in events()]
    names = ("user_id", "item_id", "timestamp", "category", "action", "tags", "city")
    lines = [",".join("" if row[name] is None else str(row[name]) for name in names) for row in raw]
    for part in (0, 1):
        (tmp_path / f"part{part}.csv").write_text("\n".join([",".join(names), *lines[part::2], ""]))
    feature = [{"name": "action", "side": "history"}, {"name": "tags", "multi": True, "separator": "|"}]
    plan = config("time-split", features=feature)
    csv = ingest(f"{tmp_path}/part*.csv", tmp_path / "csv", plan)
    parts = [write(tmp_path / f"{part}.parquet", events()[part::2]) for part in (0, 1)]
    parquet = ingest(parts, tmp_path / "parquet", config("time-split"))
    assert csv.splits == parquet.splits and csv.report == parquet.report


def bad_impressions(**changes: Any) -> list[Row]:
    return [{**row, **changes} for row in impressions()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"click": None}, r"i\.parquet: column click: null in \d+ of \d+ rows; remove or fill"),
        ({"price": float("nan")}, r"i\.parquet: column price: null in"),
        ({"request": None}, r"i\.parquet: column request: null in"),
        ({"timestamp": START * 1000}, r"column timestamp: .* too large for unix seconds"),
        ({"timestamp": -1}, r"column timestamp: -1 is before 1970"),
    ],
)
def test_bad_impressions_are_explained(changes: Row, message: str, tmp_path: Path) -> None:
    given = write(tmp_path / "i.parquet", bad_impressions(**changes), SHOWN)
    with pytest.raises(DataError, match=message):
        ingest(
            write(tmp_path / "e.parquet", events()),
            tmp_path / "log",
            config("impressions"),
            impressions=given,
        )
    assert not (tmp_path / "log").exists()


def test_missing_inputs_are_explained(tmp_path: Path) -> None:
    source = write(tmp_path / "e.parquet", events())
    given = write(tmp_path / "i.parquet", impressions(), SHOWN)
    out = tmp_path / "log"
    with pytest.raises(ConfigError, match="add --impressions FILE"):
        ingest(source, out, config("impressions"))
    with pytest.raises(ConfigError, match="uses no impressions"):
        ingest(source, out, config("leave-last"), impressions=given)
    with pytest.raises(ConfigError, match="name them with --events"):
        ingest(None, out, config("leave-last"))
    with pytest.raises(ConfigError, match="choose duckdb or spark"):
        ingest(source, out, config("leave-last"), engine="sql")
    with pytest.raises(DataError, match=r"none\*: no such file; name a Parquet or CSV file of raw events"):
        ingest(tmp_path / "none*", out, config("leave-last"))
    with pytest.raises(DataError, match=r"lower requests\.min_events"):
        ingest(source, out, config("leave-last", requests={"min_events": 1000}))
    with pytest.raises(DataError, match=r"column nope: no such column \(features: nope\)"):
        ingest(source, out, config("time-split", features=[{"name": "nope"}]))
    with pytest.raises(DataError, match=r"column tags: type is list.*expected an integer or a string"):
        ingest(source, out, config("time-split", features=[{"name": "tags"}]))
    with pytest.raises(DataError, match=r"column city: .*expected a list"):
        ingest(source, out, config("time-split", features=[{"name": "city", "multi": True}]))
    (tmp_path / "e.csv").write_text("user_id,item_id,timestamp,category\n1,2,3,a\n")
    with pytest.raises(DataError, match=r"e\.csv: Parquet and CSV are mixed"):
        ingest([source, tmp_path / "e.csv"], out, config("leave-last"))


def test_a_csv_value_of_another_type_is_explained(tmp_path: Path) -> None:
    lines = [f"{user},{item},{START + item},c" for user in range(100) for item in range(1000)]
    (tmp_path / "e.csv").write_text("\n".join(["user_id,item_id,timestamp,category", *lines, "1,2,x,c"]))
    plan = config("leave-last", features=[], context=[])
    with pytest.raises(DataError, match=r"e\.csv: column timestamp: line 100002: 'x' is not unix seconds"):
        ingest(tmp_path / "e.csv", tmp_path / "log", plan)


def test_report_names_what_was_left_out(tmp_path: Path) -> None:
    log = Log(tmp_path, "leave-last", 2, requests={"min_events": 15})
    few = sum(len(ordered(log, user)) < 15 for user in range(1, 5))
    lines = report_lines(log.manifest)
    assert f"dropped: {few} users below min events" in lines and "context city: 3 table rows" in lines


@pytest.mark.parametrize("protocol", ["next-basket", "time-split", "leave-last"])
def test_positives_of_new_items_are_counted_or_dropped(protocol: str, tmp_path: Path) -> None:
    requests = {"min_history": 0, "min_events": 9, "exclude": "request", "negatives": 2}
    kept = Log(tmp_path, protocol, 4, requests=requests)
    first = {
        item: min(e["timestamp"] for e in kept.events if e["item_id"] == item)
        for item in {event["item_id"] for event in kept.events}
    }

    def chosen(log: Log, label: float) -> list[tuple[tuple[int, int], bool]]:
        """(request, whether the item is new) of the candidates with a label."""
        return [
            (key, first[item] >= request["request_timestamp"])
            for key, request in log.requests().items()
            for item, one in zip(request["candidate_item_id"], request["label_click"], strict=True)
            if one == label
        ]

    new = [key for key, is_new in chosen(kept, 1.0) if is_new]
    assert sum(kept.manifest.report["positives_new_items"].values()) == len(new) > 0
    assert not any(is_new for _, is_new in chosen(kept, 0.0))
    assert any(
        "positives whose item no earlier event has: train" in line for line in report_lines(kept.manifest)
    )
    left = {key for key, is_new in chosen(kept, 1.0) if not is_new}
    dropped = Log(tmp_path, protocol, 4, requests=requests | {"new_items": "drop"})
    assert {key for key, _ in chosen(dropped, 1.0)} == left == dropped.requests().keys()
    assert not any(is_new for label in (0.0, 1.0) for _, is_new in chosen(dropped, label))
    report = dropped.manifest.report
    assert report["dropped"]["requests_for_new_items_only"] == len(kept.requests()) - len(left) > 0
    assert set(report["positives_new_items"].values()) == {0}


def test_what_impressions_leave_unknown_is_as_of_the_request(tmp_path: Path) -> None:
    base: Row = dict.fromkeys(EVENT)
    raw = [
        base | {"user_id": 1, "item_id": 5, "timestamp": START + day * DAY, "category": category}
        for day, category in enumerate(["a", "b", None, "c"])
    ]
    shown = [impressions()[0] | {"user_id": 1, "item_id": 5, "request": day} for day in range(1, 5)]
    shown = [row | {"timestamp": START + row["request"] * DAY, "category": None} for row in shown]
    shown[-1]["category"] = "served"
    given = write(tmp_path / "i.parquet", shown, (*SHOWN, "category"))
    source = write(tmp_path / "e.parquet", raw)
    ingest(source, tmp_path / "log", config("impressions"), impressions=given)
    ids = ids_of_values(tmp_path / "log", "category_id")
    found = {
        request: category
        for row in rows(tmp_path / "log")
        for request, [category] in zip(row["request_id"], row["candidate_category_id"], strict=True)
    }
    assert found == {1: ids["a"], 2: ids["b"], 3: ids["b"], 4: ids["served"]}


BAD_NUMBERS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "rating": (
        {"buy": 4.0},
        "buy",
        r"buy: holds 4 to 4, but impressions\.labels\.buy is binary, 0 or 1 \(\d+ of",
    ),
    "minus one": ({"buy": -1.0}, "buy", r"column buy: holds -1 to -1, but .*positive_from = NUMBER"),
    "infinite label": ({"buy": float("inf")}, "buy", r"column buy: holds infinity \(inf to inf\); remove"),
    "share": ({"buy": 0.5}, "buy", r'holds 0\.5 to 0\.5, but .*kind = "probability"'),
    "no share": (
        {"buy": 1.5},
        {"column": "buy", "kind": "probability"},
        r"is a probability, 0 to 1 \(\d+ of",
    ),
    "infinite rating": ({"buy": float("-inf")}, {"column": "buy", "positive_from": 3}, "holds infinity"),
    "weight": (
        {"importance": -0.5},
        "buy",
        r"column importance: -0\.5 is negative, and a weight is at least",
    ),
    "infinite weight": ({"importance": float("inf")}, "buy", r"column importance: holds infinity"),
    "price": ({"price": float("-inf")}, "buy", r"column price: holds infinity"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_numbers_that_cannot_be_learnt_from_are_refused(case: str, tmp_path: Path) -> None:
    changes, label, message = BAD_NUMBERS[case]
    given = as_parquet(
        tmp_path / "i.parquet", [{**row, "buy": 0.0, **changes} for row in impressions()], SHOWN
    )
    plan = config(
        "impressions", impressions={"labels": {"click": "click", "buy": label}, "request": "request"}
    )
    plan = plan.model_copy(
        update={
            "impressions": plan.impressions.model_copy(update={"weight": "importance", "numeric": ("price",)})
        }
    )
    with pytest.raises(DataError, match=message):
        ingest(write(tmp_path / "e.parquet", events()), tmp_path / "log", plan, impressions=given)


def test_declared_labels_are_written_as_declared(tmp_path: Path) -> None:
    shown = [
        {**row, "buy": row["price"] / 25, "click": 1 + number % 5} for number, row in enumerate(impressions())
    ]
    labels = {
        "buy": {"column": "buy", "kind": "probability"},
        "click": {"column": "click", "positive_from": 4},
    }
    plan = config("impressions", impressions={"labels": labels, "request": "request", "numeric": ["click"]})
    given = as_parquet(tmp_path / "i.parquet", shown, SHOWN)
    manifest = ingest(write(tmp_path / "e.parquet", events()), tmp_path / "log", plan, impressions=given)
    found = [
        values
        for row in rows(tmp_path / "log")
        for one in zip(row["label_buy"], row["label_click"], row["numeric_click"], strict=True)
        for values in zip(*one, strict=True)
    ]
    assert {(click, rating) for _, click, rating in found} == {(0, 1), (0, 2), (0, 3), (1, 4), (1, 5)}
    assert len({buy for buy, _, _ in found}) > 50
    assert sum(info.positives for info in manifest.splits.values()) == sum(buy >= 0.5 for buy, _, _ in found)
