"""Ingest against plain Python: what a request may see, what it offers, and what a failure leaves."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipelines.ingest.ingest as module
from embeddings.errors import DataError
from pipelines.ingest.ingest import IngestConfig, ingest, report_lines
from trainer.log.schema import LogManifest, read_manifest, schema_of

DAY = 86_400
START = 1_483_228_800  # 2017-01-01
COLUMNS = ("user_id", "item_id", "basket_id", "timestamp", "category", "type_id")
# Ibis 12 calls what DuckDB 2 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")

Event = tuple[int, int, int | None, int, str | None, int | None]


def config(**changes: Any) -> IngestConfig:
    tree: dict[str, Any] = {
        "events": {"request": "basket_id", "taxonomy": ["category", "type_id"]},
        "requests": {"positives": 3, "negatives": 2, "min_history": 1},
        "split": {"validation": "2017-01-05", "test": "2017-01-08"},
        "files": {"rows_per_group": 2, "rows_per_file": 4},
        "engine": {"threads": 2, "memory_limit": "500MB"},
    }
    for key, value in changes.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    return IngestConfig.model_validate(tree)


def world(seed: int = 0, users: int = 12, items: int = 60, baskets: int = 12) -> list[Event]:
    """Users with baskets on random days; items fall into categories, one item has none."""
    random = Random(seed)
    events: list[Event] = []
    for user in range(users):
        for basket in range(baskets):
            time = START + random.randrange(10) * DAY + random.randrange(3)
            for item in random.sample(range(items), random.randint(1, 5)):
                category = None if item == 0 else f"c{item % 7}"
                events.append((user, item + 1000, user * 100 + basket, time, category, item % 3))
    random.shuffle(events)
    return events


def write(path: Path, events: Iterable[Event]) -> Path:
    columns = list(zip(*events, strict=True)) or [()] * len(COLUMNS)
    kinds = [pa.string() if name == "category" else pa.int64() for name in COLUMNS]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, kinds, strict=True)]
    pq.write_table(pa.table(dict(zip(COLUMNS, arrays, strict=True))), path)
    return path


def rows(log: Path, split: str | None = None) -> list[dict[str, Any]]:
    manifest = read_manifest(log)
    chosen = manifest.splits.values() if split is None else [manifest.splits[split]]
    found: list[dict[str, Any]] = []
    for file in (file for info in chosen for file in info.files):
        found += pq.ParquetFile(log / file.path, page_checksum_verification=True).read().to_pylist()
    return found


def ids_of_values(log: Path, feature: str) -> dict[Any, int]:
    table = pq.read_table(log / "vocab" / f"{feature}.parquet").to_pydict()
    return dict(zip(table["value"], table["id"], strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], Path, LogManifest]:
    folder = tmp_path_factory.mktemp("log")
    events = world()
    manifest = ingest(write(folder / "events.parquet", events), folder / "log", config())
    return events, folder / "log", manifest


def test_a_column_of_nulls_has_an_empty_vocabulary(tmp_path: Path) -> None:
    events = [(*event[:5], None) for event in world(seed=6)]
    manifest = ingest(write(tmp_path / "events.parquet", events), tmp_path / "log", config())
    assert manifest.features["type_id"].rows == 1 and ids_of_values(tmp_path / "log", "type_id") == {}
    assert {i for row in rows(tmp_path / "log") for i in row["history_type_id"]} == {0}


def test_without_a_request_column_a_second_is_a_request(tmp_path: Path) -> None:
    events = world(seed=5)
    settings = config(events={"request": ""})
    ingest(write(tmp_path / "events.parquet", events), tmp_path / "log", settings)
    found = {(row["user_id"], at) for row in rows(tmp_path / "log") for at in row["request_timestamp"]}
    first = {user: min(time for u, *_, time, _, _ in events if u == user) for user, *_ in events}
    assert found == {(user, time) for user, _, _, time, _, _ in events if time > first[user]}
    assert all(row["request_id"] == row["request_timestamp"] for row in rows(tmp_path / "log"))


@st.composite
def crowded(draw: st.DrawFn) -> list[Event]:
    """Few users, few seconds: many ties, repeated rows, baskets that last, events without a basket."""
    size = draw(st.integers(4, 30))
    event = st.tuples(
        st.integers(1, 2),
        st.integers(1, 6),
        st.one_of(st.none(), st.integers(1, 5)),
        st.integers(START, START + 4),
        st.sampled_from([None, "a", "b"]),
        st.one_of(st.none(), st.integers(0, 2)),
    )
    return draw(st.lists(event, min_size=size, max_size=size))


@settings(max_examples=4, deadline=None)
@given(st.lists(crowded(), min_size=8, max_size=8))
def test_a_request_sees_exactly_the_strictly_earlier_events(crowds: list[list[Event]]) -> None:
    """Some two dozen crowds, eight in one log: an ingest costs more than all of them."""
    events = [(place * 10 + user, *rest) for place, crowd in enumerate(crowds) for user, *rest in crowd]
    expected: dict[tuple[int, int], tuple[int, int]] = {}
    for user, basket in {(event[0], event[2]) for event in events}:
        if basket is not None:
            time = min(event[3] for event in events if (event[0], event[2]) == (user, basket))
            end = sum(event[0] == user and event[3] < time for event in events)
            if end:
                expected[user, basket] = (time, end)
    with TemporaryDirectory() as folder:
        source, log = write(Path(folder) / "events.parquet", events), Path(folder) / "log"
        if not expected:
            with pytest.raises(DataError, match=r"lower requests\.min_history"):
                ingest(source, log, config())
            return
        ingest(source, log, config())
        check_histories(events, log, expected)


def check_histories(events: list[Event], log: Path, expected: dict[tuple[int, int], tuple[int, int]]) -> None:
    vocabularies = [ids_of_values(log, name) for name in ("item_id", "category_id", "type_id")]
    seen: dict[tuple[int, int], tuple[int, int]] = {}
    for row in rows(log):
        asked = list(
            zip(row["request_timestamp"], row["request_id"], row["request_history_end"], strict=True)
        )
        assert asked == sorted(asked)
        seen |= {(row["user_id"], basket): (time, end) for time, basket, end in asked}
        names = ("item_id", "category_id", "type_id", "timestamp")
        history = list(zip(*(row[f"history_{name}"] for name in names), strict=True))
        assert row["history_timestamp"] == sorted(row["history_timestamp"])
        assert len(history) == row["num_behaviors"] == max(row["request_history_end"])
        for time, _, end in asked:
            assert Counter(history[:end]) == Counter(
                (*(ids.get(event[i], 0) for ids, i in zip(vocabularies, (1, 4, 5), strict=True)), event[3])
                for event in events
                if event[0] == row["user_id"] and event[3] < time
            )
    assert seen == expected


def test_candidates_are_bought_items_and_others(made: tuple[list[Event], Path, LogManifest]) -> None:
    events, log, manifest = made
    ids = ids_of_values(log, "item_id")
    basket: dict[tuple[int, int | None], set[int]] = defaultdict(set)
    for event in events:
        basket[event[0], event[2]].add(ids[event[1]])
    first = []
    for row in rows(log):
        for request, time, items, labels in zip(
            row["request_id"],
            row["request_timestamp"],
            row["candidate_item_id"],
            row["label_purchase"],
            strict=True,
        ):
            popular = {ids[event[1]] for event in events if event[3] < time}
            bought = basket[row["user_id"], request]
            positives = [item for item, label in zip(items, labels, strict=True) if label == 1.0]
            negatives = [item for item, label in zip(items, labels, strict=True) if label == 0.0]
            assert len(positives) == min(3, len(bought)) and bought.issuperset(positives)
            assert len(negatives) == 2 * len(positives) and popular.issuperset(negatives)
            assert not bought.intersection(negatives)
            assert len(items) == len(set(items)) == len(positives) + len(negatives)
            first.append(labels[0])
    assert manifest.report["dropped"]["negatives_not_found"] == 0
    assert 0.2 < sum(first) / len(first) < 0.5  # a third are positives: they do not come first


def test_negatives_follow_popularity(tmp_path: Path) -> None:
    # Item 1 has half of the past events, and is in no basket of the requests that are kept.
    past: list[Event] = [(0, 1 + (i % 2) * (1 + i // 2 % 20), 1, START, "a", 0) for i in range(80)]
    asks: list[Event] = [(0, 50, 10 + i, START + DAY + i, "a", 0) for i in range(300)]
    late = config(requests={"negatives": 1, "min_history": 80}, split={"validation": "2017-01-02"})
    ingest(write(tmp_path / "events.parquet", past + asks), tmp_path / "log", late)
    log = tmp_path / "log"
    item = ids_of_values(log, "item_id")
    drawn = Counter(
        candidate
        for row in rows(log)
        for items, labels in zip(row["candidate_item_id"], row["label_purchase"], strict=True)
        for candidate, label in zip(items, labels, strict=True)
        if not label
    )
    assert drawn[item[50]] == 0
    assert 0.4 < drawn[item[1]] / sum(drawn.values()) < 0.6


def test_splits_follow_request_time(made: tuple[list[Event], Path, LogManifest]) -> None:
    _, log, manifest = made
    limits = {"train": (0, 4), "validation": (4, 7), "test": (7, 10)}
    for split, (low, high) in limits.items():
        found = rows(log, split)
        times = [time for row in found for time in row["request_timestamp"]]
        assert times and all(START + low * DAY <= time < START + high * DAY for time in times)
        users = [row["user_id"] for row in found]
        assert len(users) == len(set(users)) and users != sorted(users)
        info = manifest.splits[split]
        labels = [label for row in found for one in row["label_purchase"] for label in one]
        totals = (
            len(found),
            len(times),
            len(labels),
            sum(labels),
            sum(row["num_behaviors"] for row in found),
        )
        assert totals == (info.rows, info.requests, info.candidates, info.positives, info.behaviors)


def test_files_follow_schema_and_layout(made: tuple[list[Event], Path, LogManifest]) -> None:
    _, log, manifest = made
    schema = schema_of(manifest)
    for info in manifest.splits.values():
        assert [file.rows for file in info.files[:-1]] == [4] * (len(info.files) - 1)
        for file in info.files:
            parquet = pq.ParquetFile(log / file.path)
            assert parquet.schema_arrow.equals(schema)
            groups = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            assert sum(groups) == file.rows and max(groups) <= 2
            assert (log / file.path).stat().st_size == file.bytes
    assert sorted(path.name for path in log.iterdir()) == sorted(
        [*manifest.splits, "vocab", "manifest.json", "manifest.sha256"]
    )


def test_vocabularies_are_dense_and_count_the_past(made: tuple[list[Event], Path, LogManifest]) -> None:
    events, log, manifest = made
    for feature, place in (("item_id", 1), ("category_id", 4), ("type_id", 5)):
        table = pq.read_table(log / "vocab" / f"{feature}.parquet").to_pydict()
        known: set[Any] = {event[place] for event in events} - {None}
        past = Counter(event[place] for event in events if event[3] < START + 4 * DAY)
        assert table["value"] == sorted(known)
        assert table["id"] == list(range(1, len(table["id"]) + 1))
        assert table["count"] == [past[value] for value in table["value"]]
        assert manifest.features[feature].rows == len(table["id"]) + 1
        for row in rows(log):
            ids = row[f"history_{feature}"] + [i for one in row[f"candidate_{feature}"] for i in one]
            assert min(ids) >= 0 and max(ids) < manifest.features[feature].rows


def test_candidates_have_the_taxonomy_as_of_the_request(tmp_path: Path) -> None:
    day = iter(range(START, START + 10 * DAY, DAY))
    events: list[Event] = [
        (0, 1, 1, next(day), "old", 0),
        (0, 1, 2, next(day), "new", 0),  # asks for item 1 as it was
        (0, 1, 3, next(day), None, 0),
        (0, 1, 4, next(day), "last", 0),  # a missing category is the last known one
        (0, 2, 5, next(day), "x", 1),  # nobody had item 2, and it never changes
        (0, 3, 6, next(day), "y", 2),  # it will change: what it will be is not known
        (0, 3, 7, next(day), "z", 2),
        (0, 4, 8, next(day), None, 1),  # what becomes known later is not known yet
        (0, 4, 9, next(day), "w", 1),
    ]
    manifest = ingest(write(tmp_path / "events.parquet", events), tmp_path / "log", config())
    ids = {name: ids_of_values(tmp_path / "log", name) for name in ("item_id", "category_id", "type_id")}
    found = {}
    for row in rows(tmp_path / "log"):
        asked = zip(row["request_id"], *(row[f"candidate_{name}"] for name in ids), strict=True)
        for request, items, categories, types in asked:
            found[request] = {item: values for item, *values in zip(items, categories, types, strict=True)}
    one, two, three = (ids["item_id"][item] for item in (1, 2, 3))
    expected = {
        2: (one, "old", 0),
        3: (one, "new", 0),
        4: (one, "new", 0),
        5: (two, "x", 1),
        7: (three, "y", 2),
    }
    for request, (item, category, kind) in expected.items():
        assert found[request][item] == [ids["category_id"][category], ids["type_id"][kind]]
    four = ids["item_id"][4]
    assert found[6][three] == [0, ids["type_id"][2]] and found[8][four] == found[9][four] == [0, 2]
    # Item 1 of the negatives, too, is what it was.
    assert {request: values[one][0] for request, values in found.items() if one in values} == {
        2: ids["category_id"]["old"],
        3: ids["category_id"]["new"],
        4: ids["category_id"]["new"],
        **{request: ids["category_id"]["last"] for request in (5, 6, 7, 8, 9) if one in found[request]},
    }
    assert manifest.report["changing_items"] == {"category_id": 3} and manifest.report["event_items"] == 4
    assert "category_id: changes in time for 3 of 4 items" in " ".join(report_lines(manifest))


def test_threads_and_row_order_change_nothing(
    made: tuple[list[Event], Path, LogManifest], tmp_path: Path
) -> None:
    events, log, manifest = made
    other = config(engine={"threads": 1})
    again = ingest(write(tmp_path / "e.parquet", sorted(events, key=str)), tmp_path / "log", other)
    assert again.splits == manifest.splits  # SHA-256 of every file included
    for path in (log / "vocab").iterdir():
        assert path.read_bytes() == (tmp_path / "log" / "vocab" / path.name).read_bytes()
    seeded = ingest(tmp_path / "e.parquet", tmp_path / "seeded", config(seed=8))
    assert seeded.splits != manifest.splits


def test_a_trial_log_is_part_of_the_full_one(
    made: tuple[list[Event], Path, LogManifest], tmp_path: Path
) -> None:
    events, log, manifest = made
    few = ingest(write(tmp_path / "events.parquet", events), tmp_path / "log", config(users=3))
    full = {row["user_id"]: row for row in rows(log, "train")}
    assert len({row["user_id"] for row in rows(tmp_path / "log")}) == 3
    assert all(row == full[row["user_id"]] for row in rows(tmp_path / "log", "train"))
    assert few.features == manifest.features


def test_dropped_requests_are_counted(tmp_path: Path) -> None:
    events: list[Event] = [(0, i, i, START + i, "a", 0) for i in range(1, 7)]
    events += [(0, 9, None, START, "a", 0)]
    manifest = ingest(
        write(tmp_path / "events.parquet", events), tmp_path / "log", config(requests={"min_history": 4})
    )
    assert manifest.report["dropped"]["requests_below_min_history"] == 3
    assert manifest.report["dropped"]["events_without_request"] == 1
    assert manifest.report["history_length"] == {"p50": 5, "p90": 5, "p99": 5, "max": 6}
    assert manifest.splits["test"].files == [] and not (tmp_path / "log" / "test").exists()
    told = "dropped: 3 of 6 requests, which have fewer earlier events than requests.min_history = 4"
    assert told in report_lines(manifest)
    none = {name: info.model_copy(update={"requests": 0}) for name, info in manifest.splits.items()}
    fewer = manifest.model_copy(update={"splits": none})
    assert f"WARNING: {told.replace('of 6', 'of 3')}; lower it to keep more" in report_lines(fewer)


BAD: dict[str, tuple[dict[str, pa.Array], str]] = {
    "null item": ({"item_id": pa.array([1, None])}, r"column item_id: null in 1 of 2 rows"),
    "null user": ({"user_id": pa.array([None, 1])}, r"column user_id: null in 1 of 2 rows"),
    "null time": ({"timestamp": pa.array([None, 1])}, r"column timestamp: null in 1 of 2 rows"),
    "list user": (
        {"user_id": pa.array([["a"], ["b"]])},
        r"column user_id: type is list.*expected an integer",
    ),
    "float item": ({"item_id": pa.array([1.5, 2.0])}, r"column item_id: row 0: '1\.5' is not a whole number"),
    "milliseconds": ({"timestamp": pa.array([START * 1000] * 2)}, r'column timestamp: .*unit = "ms"'),
    "late": ({"timestamp": pa.array([START * 2] * 2)}, r"column timestamp: no event before split.validation"),
    "empty": ({name: pa.array([], pa.int64()) for name in COLUMNS}, "has no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_events_are_explained(case: str, tmp_path: Path) -> None:
    changes, message = BAD[case]
    good = {name: pa.array([1, 2]) for name in COLUMNS}
    pq.write_table(pa.table({**good, **changes}), tmp_path / "events.parquet")
    with pytest.raises(DataError, match=r"events\.parquet: .*" + message):
        ingest(tmp_path / "events.parquet", tmp_path / "log", config())
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]


def test_missing_and_unreadable_events_are_explained(tmp_path: Path) -> None:
    source = tmp_path / "events.parquet"
    with pytest.raises(DataError, match=r"events\.parquet: no such file"):
        ingest(source, tmp_path / "log", config())
    source.write_text("user,item")
    with pytest.raises(DataError, match=r"events\.parquet: is no Parquet file"):
        ingest(source, tmp_path / "log", config())
    pq.write_table(pa.table({"user_id": [1]}), source)
    with pytest.raises(DataError, match=r"column timestamp: no such column \(events.timestamp\)"):
        ingest(source, tmp_path / "log", config())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_existing_log_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, log = write(tmp_path / "events.parquet", world(users=3)), tmp_path / "log"
    ingest(source, log, config())
    before = snapshot(tmp_path)
    with pytest.raises(DataError, match=r"is a sequence log already; name another folder or say --overwrite"):
        ingest(source, log, config())
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        with pytest.raises(DataError, match="cannot be made: disk is full"):
            ingest(source, log, config(seed=9), overwrite=True)
    assert snapshot(tmp_path) == before and len(list(tmp_path.iterdir())) == 2
    assert ingest(source, log, config(seed=9), overwrite=True) == read_manifest(log)
    assert snapshot(tmp_path) != before and len(list(tmp_path.iterdir())) == 2


def test_another_folder_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="not a sequence log"):
        ingest(write(tmp_path / "events.parquet", world()), tmp_path / "log", config(), overwrite=True)
    assert (tmp_path / "log" / "thesis.txt").read_text() == "precious"


def test_bad_manifests_are_explained(made: tuple[list[Event], Path, LogManifest], tmp_path: Path) -> None:
    good = json.loads((made[1] / "manifest.json").read_text())
    path = tmp_path / "manifest.json"
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        read_manifest(tmp_path)
    (tmp_path / "requests.csv").write_text("user_id\n")
    with pytest.raises(DataError, match=r"requests\.csv: is a file, and a sequence log is a folder; name"):
        read_manifest(tmp_path / "requests.csv")
    for text, message in (
        ("{", "not readable as JSON"),
        ("[]", "format is None"),
        (json.dumps({**good, "format": "other"}), "format is 'other'"),
        (json.dumps({**good, "version": 2}), "version 2 is unknown"),
        (json.dumps({**good, "extra": 1}), "extra: "),
        (json.dumps(good).replace("train/part-00000", "../part-00000"), "leaves the log's folder"),
        (json.dumps({**good, "taxonomy": ["nope"]}), "does not have: nope"),
    ):
        path.write_text(text)
        (tmp_path / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
        with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
            read_manifest(tmp_path)
