"""More features than one statement joins, and what engines say when they fail."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import duckdb
import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import ConfigError, DataError
from pipelines.ingest import rows as ingest_blocks
from pipelines.ingest.domains import merge
from pipelines.ingest.engine import connect
from pipelines.ingest.faults import explain
from pipelines.ingest.ingest import ingest
from pipelines.ingest.sections import EngineConfig
from tests.helpers.rawlogs import config, ids_of_values, rows

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")

DAY, START = 86_400, 1_483_228_800
MANY = 70  # a chain of 47 joins was too much for Ibis' recursion


def table(names: list[str]) -> dict[str, list[Any]]:
    """One user with one event a day; each column has its own values, some of them null."""
    days = range(12)
    found: dict[str, list[Any]] = {
        "user_id": [1] * 12,
        "item_id": [day * 3 for day in days],
        "timestamp": [START + day * DAY for day in days],
    }
    for place, name in enumerate(names):
        found[name] = [None if (day + place) % 7 == 0 else (day * (place + 3)) % (place + 2) for day in days]
    return found


def test_dozens_of_features_become_their_ids(tmp_path: Path) -> None:
    # Names that are like what an engine may call a column on the way.
    names = ["cat", "cat_code", "cat_word", "cat_right", *(f"f{number}" for number in range(MANY))]
    raw = table(names)
    raw["tags"] = [["b", "a", "b"], [], None, ["c"], ["a", None]] + [["a"]] * 7
    pq.write_table(pa.table(raw), tmp_path / "events.parquet")
    features = [{"name": name} for name in names] + [{"name": "tags", "multi": True}]
    settings = config("time-split", events={"taxonomy": []}, features=features, context=[])
    ingest(tmp_path / "events.parquet", tmp_path / "log", settings)
    last = max(rows(tmp_path / "log"), key=lambda row: row["num_behaviors"])
    seen = last["num_behaviors"]
    assert seen > 3
    for name in names:
        ids = ids_of_values(tmp_path / "log", name)
        assert ids == {value: place + 1 for place, value in enumerate(sorted({*raw[name]} - {None}))}
        assert last[f"history_{name}"] == [ids.get(value, 0) for value in raw[name]][:seen], name
    assert last["history_tags"] == [[1, 2], [], [], [3], [1], *([[1]] * 7)][:seen]


def test_events_of_hundreds_of_domains_are_one_table() -> None:
    schema = dict.fromkeys(("user_id", "item_id", "action_id", "timestamp"), "int64")
    merged = merge([ibis.table(schema, name=f"domain_{number}") for number in range(200)])
    sql = ibis.to_sql(merged, dialect="duckdb")
    assert all(f'"domain_{number}"' in sql for number in range(200))


def test_errors_while_rows_stream_are_errors_of_the_data(tmp_path: Path) -> None:
    engine = connect("duckdb", EngineConfig(threads=1, memory_limit="500MB"), tmp_path)
    try:
        late = ibis.range(300_000).unnest().name("i").as_table()
        text = ibis.ifelse(late.i == 299_999, "x", late.i.cast("string"))
        batches = engine.stream(late.select(number=text.cast("int64")), 1000)
        with pytest.raises(DataError, match=r"not fit its column: Conversion Error: .*'x'.*text_columns"):
            sum(batch.num_rows for batch in batches)
    finally:
        engine.close()


def test_an_engine_works_where_its_file_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_, files = ibis.duckdb.connect, []

    def careful(file: str, **settings: str) -> Any:
        files.append(file)
        if file != ":memory:":
            raise duckdb.IOException(f'IO Error: Could not set lock on file "{file}": No locks available')
        return connect_(file, **settings)

    monkeypatch.setattr(ibis.duckdb, "connect", careful)
    engine = connect("duckdb", EngineConfig(threads=1), tmp_path)
    kept = engine.keep("kept", ibis.range(3).unnest().name("a").as_table())
    assert engine.rows(kept.aggregate(total=kept.a.sum())) == [{"total": 3}]
    engine.close()
    assert files == [str(tmp_path / "tables.duckdb"), ":memory:"]


def test_an_engine_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tables.duckdb").mkdir()
    with pytest.raises(DataError, match="cannot read or write a file"):
        connect("duckdb", EngineConfig(), tmp_path)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("Out of Memory Error: could not allocate block", ConfigError, "engine.memory_limit is too small"),
        ("Out of Memory Error: failed to offload data block of size 256.0 KiB", DataError, "has no room"),
        ('IO Error: Could not write file "x": No space left on device', DataError, "has no room"),
        ("IO Error: Could not set lock on file", DataError, "cannot read or write a file"),
        ("Out of Range Error: Overflow in addition of INT64", DataError, "does not fit its column"),
        (
            "Binder Error: table has duplicate column name\nLINE 1: x",
            DataError,
            "cannot work with these tables",
        ),
        (
            "An error occurred while calling o9.parquet.\n: org.apache.spark.SparkException: Job aborted\n"
            "Caused by: java.lang.OutOfMemoryError: Java heap space\n\tat x",
            ConfigError,
            r"\(java.lang.OutOfMemoryError: Java heap space\)",
        ),
        (
            "An error occurred while calling o9.\n: x\nCaused by: java.lang.NumberFormatException: For a",
            DataError,
            "does not fit its column: java.lang.NumberFormatException: For a; mend it",
        ),
    ],
)
def test_what_engines_say_becomes_one_line_that_helps(text: str, kind: type[Exception], says: str) -> None:
    told = explain(text)
    assert type(told) is kind and "\n" not in str(told)
    with pytest.raises(kind, match=says):
        raise told


def test_faults_of_this_code_are_not_put_on_the_data() -> None:
    assert explain("INTERNAL Error: Attempted to dereference a null pointer") is None
    assert explain('Parser Error: syntax error at or near "SELEC"') is None


def test_rows_that_change_their_order_are_written_many_at_a_time(tmp_path: Path) -> None:
    keys = [f"{number:06d}" for number in np.random.default_rng(0).permutation(6000)]
    batches = [pa.record_batch({"row_key": keys[at : at + 4]}) for at in range(0, 6000, 4)]
    limits = ["002000", "004000"]
    bytes_of_all = sum(batch.nbytes for batch in batches)
    paths = ingest_blocks._scatter(iter(batches), limits, tmp_path, bytes_of_all // 3)
    found = [pq.read_table(path).column("row_key").to_pylist() for path in paths]
    assert [sorted(part) for part in found] == [sorted(keys)[at : at + 2000] for at in (0, 2000, 4000)]
    groups = Counter(path.name for path in paths for _ in range(pq.ParquetFile(path).num_row_groups))
    assert max(groups.values()) <= 4, groups
