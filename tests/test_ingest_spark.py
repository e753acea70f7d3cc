"""DuckDB and Spark give the same rows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ingest import ingest
from tests.rawlogs import SHOWN, config, events, impressions, renew, rows, words, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:pyspark.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning"),
]

# Much is planned and compiled here, and little computed.
CHEAP = {
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xshare:auto",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.shuffle.partitions": "2",
    "spark.ui.enabled": "false",
}

# Twice as many partitions are made of what is shuffled.
ENGINE = {"threads": 2}


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
        ("next-basket", {"requests": {"min_history": 0, "new_items": "drop"}}),
        ("impressions", {"files": {"layout": "request", "max_history": 5, "order": "time"}}),
        ("leave-last", {}),
        ("time-split", {"files": {"layout": "request"}, "context": [{"name": "home", "table": "users"}]}),
    ],
)
def test_both_engines_write_the_same_rows(
    protocol: str, changes: dict[str, Any], tmp_path: Path, spark: Any
) -> None:
    del spark
    source = write(tmp_path / "events.parquet", events())
    rows_shown = [{**row, "category": "c1" if row["click"] else None} for row in impressions()]
    given = write(tmp_path / "shown.parquet", rows_shown, (*SHOWN, "category"))
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
    assert words(tmp_path / "spark", "item_id") == words(tmp_path / "duckdb", "item_id")
