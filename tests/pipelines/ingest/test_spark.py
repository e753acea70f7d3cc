"""DuckDB and Spark give the same rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import DataError
from pipelines.ingest import encode as ingest_encoding
from pipelines.ingest import history_free
from pipelines.ingest.ingest import ingest
from tests.helpers.numbers import check_codes
from tests.helpers.opening import GOOD, Door, csv_events, parquet, text
from tests.helpers.rawlogs import (
    PARTIAL,
    SHOWN,
    as_parquet,
    config,
    events,
    ids_of_values,
    impressions,
    partly_known,
    renew,
    rows,
    write,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pyspark.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning"),
]

# Much is planned and compiled here, and little computed. Without room for all compiled code, a thread of the
# JVM throws some of it away, to be compiled again.
JVM = [
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-XX:ReservedCodeCacheSize=240m",
    "-XX:+UnlockDiagnosticVMOptions",
    "-XX:-BytecodeVerificationRemote",
]
CHEAP = {
    "spark.driver.extraJavaOptions": " ".join(JVM),
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.ui.enabled": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
}

# Twice as many partitions are made of what is shuffled.
ENGINE = {"threads": 1}


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    """One session for all tests: to start one takes longer than a test."""
    sql = pytest.importorskip("pyspark.sql", reason="pip install -r requirements/spark.txt")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java 17 or later on the path")
    builder = sql.SparkSession.builder.master("local[2]")
    for name, value in CHEAP.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


@pytest.mark.parametrize(
    ("protocol", "changes"),
    [
        ("next-basket", {"requests": {"min_history": 0, "new_items": "drop", "popularity_days": 2}}),
        (
            "impressions",
            {
                "files": {"layout": "request", "max_history": 5, "order": "time"},
                "impressions": {"labels": PARTIAL, "exposure": {"rate": 0.3, "window_days": 4}},
            },
        ),
        ("leave-last", {"requests": {"popularity_days": 3}}),
        (
            "time-split",
            {
                "files": {"layout": "request"},
                "requests": {"popularity_days": 1},
                "context": [{"name": "home", "table": "users", "ids": "hashed"}],
                "events": {"taxonomy": ["category"], "item_ids": "raw", "taxonomy_ids": "hashed"},
                "features": [{"name": "tags", "multi": True, "ids": "hashed"}],
            },
        ),
    ],
)
def test_both_engines_write_the_same_rows(
    protocol: str, changes: dict[str, Any], tmp_path: Path, spark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    del spark
    if protocol == "impressions":
        # As if there were too many features for one statement.
        monkeypatch.setattr(ingest_encoding, "_AT_ONCE", 4)
    # As if there were enough candidates to measure what they tell without any history.
    monkeypatch.setattr(history_free, "_LEAST", 2)
    source = write(tmp_path / "events.parquet", events())
    rows_shown = [{**row, "category": "c1" if row["click"] else None} for row in partly_known()]
    given = as_parquet(tmp_path / "shown.parquet", rows_shown, (*SHOWN, "category", "worth"))
    shown = given if protocol == "impressions" else None
    if protocol == "time-split":
        items, homes = {"item_id": [1001, 1002], "tags": [["x"], ["new"]]}, {"user_id": [2], "home": ["Rome"]}
        for name, table in (("item", items), ("user", homes)):
            pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
            changes = {**changes, f"{name}_table": {"files": [str(tmp_path / f"{name}.parquet")]}}
    plan = config(protocol, **changes, engine=ENGINE)
    duckdb = ingest(source, tmp_path / "duckdb", plan, impressions=shown)
    other = ingest(source, tmp_path / "spark", plan, impressions=shown, engine="spark")
    assert rows(tmp_path / "spark") == rows(tmp_path / "duckdb") != []
    assert (other.features, other.context, other.report) == (duckdb.features, duckdb.context, duckdb.report)
    assert duckdb.report["history_free"]["auc"]
    if protocol == "impressions":
        found = {one for row in rows(tmp_path / "spark") for labels in row["label_buy"] for one in labels}
        assert found == {None, 0.0, 1.0}
        labels = {split: info.labels for split, info in duckdb.splits.items()}
        assert {split: info.labels for split, info in other.splits.items()} == labels
        assert (other.partial, other.label_weights) == (["buy"], ["click", "buy"])
        assert duckdb.report["exposure"]["histogram"]["1"]


def test_numbers_have_the_same_codes(tmp_path: Path, spark: Any) -> None:
    del spark
    check_codes("spark", tmp_path)


def test_both_engines_continue_a_vocabulary_alike(tmp_path: Path, spark: Any) -> None:
    del spark
    given = write(tmp_path / "shown.parquet", impressions(), SHOWN)
    source = write(tmp_path / "events.parquet", events(1))
    ingest(source, tmp_path / "old", config("impressions"), impressions=given)
    source = write(tmp_path / "events.parquet", renew(events(2)))
    given = write(tmp_path / "shown.parquet", renew(impressions()), SHOWN)
    plan = config("impressions", engine=ENGINE, vocabulary={"log": str(tmp_path / "old")})
    duckdb = ingest(source, tmp_path / "duckdb", plan, impressions=given)
    other = ingest(source, tmp_path / "spark", plan, impressions=given, engine="spark")
    # New items are unknown to the log, but have ids while it is made: their order is compared too.
    assert rows(tmp_path / "spark") == rows(tmp_path / "duckdb") != []
    assert (other.features, other.context, other.report) == (duckdb.features, duckdb.context, duckdb.report)
    assert duckdb.report["new_values"]["item_id"]["values"] > 0
    assert ids_of_values(tmp_path / "spark", "item_id") == ids_of_values(tmp_path / "duckdb", "item_id")


@pytest.fixture
def doors(tmp_path: Path, spark: Any) -> Iterator[list[Door]]:
    del spark
    both = [Door(tmp_path / f"{name}[1]{{a,b}}", name) for name in ("duckdb", "spark")]
    yield both
    for door in both:
        door.engine.close()


def test_both_engines_open_the_same_files(doors: list[Door], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    parquet(raw / "day1.parquet", item_id=[0, 0, 0])
    named = [raw / name / "e.parquet" for name in ("day[1]", "a{b,c}?", "user_id=7")]
    twins = {"CAT": ["a", "b", "c"], "cat": [1, 2, 3]}
    for place, path in enumerate(named):
        times = [10 * place + time for time in GOOD["timestamp"]]
        parquet(path, timestamp=times, **(twins if place else dict(reversed(twins.items()))))
    features = {"features": [{"name": "small", "column": "cat"}, {"name": "large", "column": "CAT"}]}
    one, other = (door.events(named, **features) for door in doors)
    assert one == other and [row["user_id"] for row in other] == [1, 2, 3] * 3
    assert [(row["small"], row["large"]) for row in other] == [(1, "a"), (2, "b"), (3, "c")] * 3
    text(raw / "b1.csv", *csv_events(["0"]))
    path = text(raw / "b[1].csv", *csv_events(["7"]))
    assert [door.column(path, "item_id") for door in doors] == [[7], [7]]
    with pytest.raises(DataError, match=r"Spark skips files whose name begins with _ or \.; rename it"):
        doors[1].events(parquet(raw / "_e.parquet"))


def test_both_engines_understand_csv_alike(doors: list[Door], tmp_path: Path) -> None:
    lines = [
        "user_id,item_id,timestamp,cat,tags",
        '007,"a, ""b""",2017-01-01T01:00:00.5+01:00,,x|y| 01 ',
        '7,"line\nend",1483228801,"",||1',
        ' 7,"",2017-01-01 00:00:02,"|",',
    ]
    one = text(tmp_path / "a.csv", *lines, end="\r\n")
    other = text(tmp_path / "b.tsv", "timestamp\tuser_id\tcat\ttags\titem_id", "1483228803.0\t+7\tx\t\t01")
    features = [{"name": "cat"}, {"name": "tags", "multi": True, "separator": "|"}]
    with pytest.raises(DataError, match="column item_id: null in 1 of 4 rows"):
        doors[0].events([one, other], features=features)
    lines[-1] = lines[-1].replace('""', "1")
    text(one, *lines, end="\r\n")
    found = [door.events([one, other], features=features, csv={"nulls": ["x"]}) for door in doors]
    assert found[0] == found[1]
    names = ("user_id", "item_id", "timestamp", "cat", "tags")
    assert [tuple(row[name] for name in names) for row in found[1]] == [
        ("007", 'a, "b"', 1483228800, None, ["x", "y", "01"]),
        ("7", "line\nend", 1483228801, None, ["1"]),
        (" 7", "1", 1483228802, "|", None),
        ("+7", "01", 1483228803, None, None),
    ]
    assert doors[0].survey.columns == doors[1].survey.columns
    for content, message in (
        ("user_id,item_id,timestamp\n1,2,3\n4,5\n", r"b\.csv: line 3: 2 cells, but the header has 3"),
        ("user_id,item_id,timestamp\n1,2,soon\n", r"b\.csv: column timestamp: line 2: 'soon' is not"),
        ("user_id,item_id,timestamp\n", r"b\.csv: has no rows"),
        ("user_id,item_id,timestamp\n1,\xff,3\n", r"b\.csv: after line 1: no UTF-8 text"),
        ('user_id,item_id,timestamp\n1,"d" e,3\n', r"b\.csv: after line 1: ',' expected after"),
        ('timestamp,user_id,item_id\n3,1,"d\n4,5,6\n', r"b\.csv: after line 1: unexpected end of data"),
    ):
        (tmp_path / "b.csv").write_text(content, encoding="latin-1")
        for door in doors:
            with pytest.raises(DataError, match=message):
                door.events(tmp_path / "b.csv")
    (tmp_path / "i.csv").write_text(
        "user_id,item_id,timestamp,click\n1,7,1483228800,True\n1,8,1483228801,0.25\n"
    )
    for door in doors:
        labels = {"click": {"column": "click", "kind": "probability"}}
        rows_of = door.shown(tmp_path / "i.csv", impressions={"labels": labels})
        assert [row["label_click"] for row in rows_of] == [1.0, 0.25]


def test_both_engines_read_the_types_of_arrow_alike(doors: list[Door], tmp_path: Path) -> None:
    moments = [second * 10**9 + 5 for second in GOOD["timestamp"]]
    columns = {
        "timestamp": pa.array(moments, pa.timestamp("ns", "Asia/Tokyo")),
        "user_id": pa.array([1.0, 2.0, 3.0]),
        "large": pa.array([2**64 - 1, 1, None], pa.uint64()),
        "words": pa.array(["a", "b", None], pa.string_view()).cast(pa.string()).dictionary_encode(),
        "truth": [True, False, None],
        "nothing": pa.nulls(3),
        "lists": pa.array([[2, 1], [], None], pa.list_view(pa.int32())),
        "decimals": pa.array([3, 1, None]).cast(pa.decimal128(38, 0)),
        "floats": pa.array([3.0, float("nan"), None], pa.float32()),
    }
    path = parquet(tmp_path / "e.parquet", **columns)
    names = ["large", "words", "truth", "nothing", "decimals", "floats"]
    features = [{"name": name} for name in names] + [{"name": "lists", "multi": True}]
    found = [door.events(path, features=features) for door in doors]
    assert found[0] == found[1]
    assert [found[1][0][name] for name in names] == [str(2**64 - 1), "a", "true", None, 3, 3]
    assert [row["timestamp"] for row in found[1]] == GOOD["timestamp"]
    unit = {"events": {"timestamp_unit": "ms"}}
    for kind in ("us", "ms"):
        path = parquet(
            tmp_path / "e.parquet",
            timestamp=pa.array([time // 10**3 for time in moments], pa.timestamp("us")).cast(
                pa.timestamp(kind), safe=False
            ),
        )
        assert [door.column(path, "timestamp") for door in doors] == [GOOD["timestamp"]] * 2
    path = parquet(tmp_path / "e.parquet", timestamp=[time * 1000 + 7 for time in GOOD["timestamp"]])
    assert [door.column(path, "timestamp", **unit) for door in doors] == [GOOD["timestamp"]] * 2


def test_a_separator_stands_for_itself(doors: list[Door], tmp_path: Path) -> None:
    for sign in ("|", "\\", "^$", "'"):
        path = parquet(tmp_path / "e.parquet", tags=[f"x{sign} y\t{sign}", "z", None])
        features = [{"name": "tags", "multi": True, "separator": sign}]
        expected = [["x", "y"], ["z"], None]
        assert [door.column(path, "tags", features=features) for door in doors] == [expected] * 2
