"""Columns of numbers: their codes, the edges of buckets, and what the config and the report say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from embeddings.errors import DataError
from pipelines.ingest.engine import connect
from pipelines.ingest.files import look
from pipelines.ingest.ingest import ingest, preview, report_lines
from pipelines.ingest.numbers import quantile_edges
from pipelines.ingest.sections import EngineConfig
from tests.helpers.numbers import check_codes
from tests.helpers.rawlogs import START, config
from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.code import codes_of_integers

MNSE = {"kind": "mnse", "range": [0, 9]}


def test_an_engine_gives_the_codes_of_the_page(tmp_path: Path) -> None:
    check_codes("duckdb", tmp_path)


def slow_edges(values: list[int], count: int) -> list[int]:
    """The first number with a share of k / count before it, for each k."""
    ordered = sorted(values)
    places = {value: ordered.index(value) * count // len(ordered) for value in ordered}
    firsts = {place: min(v for v in places if places[v] == place) for place in places.values()}
    return sorted(value for place, value in firsts.items() if place)


def test_edges_are_quantiles_of_training(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    columns: dict[str, list[int | None]] = {
        "even": list(range(100)),
        "skewed": (rng.geometric(0.2, 100) - 3).tolist(),
        "alike": [7] * 99 + [None],
        "missing": [None] * 100,
    }
    table = {name: codes_of_integers(values) for name, values in columns.items()}
    times = np.where(np.arange(100) < 80, 10, 20)
    file = tmp_path / "codes.parquet"
    pq.write_table(pa.table({**table, "timestamp": times}), file)
    engine = connect("duckdb", EngineConfig(threads=1, memory_limit="500MB"), tmp_path / "spill")
    raw = engine.scan([look(file, ("timestamp",))])
    raw = raw.rename({name: f"c{place}" for place, name in enumerate([*columns, "timestamp"])})
    for name, values in columns.items():
        for cutoff, rows in ((None, values), (20, values[:80])):
            known = [value for value in rows if value is not None]
            found = quantile_edges(engine, raw, name, 7, cutoff)
            assert found == (slow_edges(known, 7) if known else []), name
    engine.close()
    counts = np.bincount(np.searchsorted(slow_edges(list(range(100)), 7), range(100), side="right"))
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        ([{"name": "a", "multi": True, "encoder": MNSE}], "an encoder is for one number a row"),
        ([{"name": "a", "ids": "raw", "encoder": MNSE}], "an encoder is for one number a row"),
        ([{"name": "a", "encoder": {"kind": "number"}}], "behaviors have no such input; set side"),
        (
            [{"name": "a", "encoder": {"kind": "number", "step": 2}, "side": "candidate"}],
            "a number is kept as it is",
        ),
        ([{"name": "a", "encoder": MNSE}, {"name": "a_base_2"}], "give the name 'a_base_2' twice"),
        ([{"name": "a", "encoder": {"kind": "digits"}}], "does not match any of the expected tags"),
    ],
)
def test_settings_that_cannot_be(features: list[dict[str, Any]], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        config("time-split", features=features)


def test_a_raw_number_is_no_context() -> None:
    with pytest.raises(ValidationError, match="requests have no numbers"):
        config("time-split", context=[{"name": "a", "encoder": {"kind": "number"}, "table": "events"}])


def write_ages(path: Path, ages: list[str]) -> Path:
    rows = [f"{place % 3},{place},{START + place * 86_400},{age}" for place, age in enumerate(ages)]
    path.write_text("\n".join(["user_id,item_id,timestamp,age", *rows]))
    return path


def plan(**changes: Any) -> Any:
    encoder = {"kind": "buckets", "count": 2}
    features = [{"name": "age", "encoder": encoder, "side": "history"}]
    base: dict[str, Any] = {"events": {"taxonomy": []}, "features": features, "context": []}
    return config("time-split", **{**base, **changes})


def test_text_that_is_no_number_is_refused_with_its_place(tmp_path: Path) -> None:
    given = write_ages(tmp_path / "events.csv", ["20", "old", *["30"] * 10])
    with pytest.raises(DataError, match="line 3: 'old' is not a number, true or false"):
        ingest(given, tmp_path / "log", plan())


def test_a_later_log_keeps_the_edges_of_the_older_one(tmp_path: Path) -> None:
    older = ingest(
        write_ages(tmp_path / "a.csv", [str(age) for age in range(20, 32)]), tmp_path / "old", plan()
    )
    assert older.features["age"].encoder == Buckets(kind="buckets", edges=(23,))
    later = write_ages(tmp_path / "b.csv", [str(age) for age in range(60, 72)])
    going_on = {"vocabulary": {"log": str(tmp_path / "old")}}
    assert ingest(later, tmp_path / "new", plan(**going_on)).features == older.features
    other = plan(features=[{"name": "age", "encoder": MNSE, "side": "history"}], **going_on)
    with pytest.raises(DataError, match="encodes the feature 'age' otherwise than this config"):
        ingest(later, tmp_path / "other", other)


def test_edges_of_users_are_those_of_all_of_them(tmp_path: Path) -> None:
    """Their table has no times, which could be before the validation."""
    given = write_ages(tmp_path / "events.csv", ["0.5", "1", *["2"] * 10])
    ages = pa.table({"user_id": [0, 1, 2], "years": [20.0, 30.25, None]})
    pq.write_table(ages, tmp_path / "users.parquet")
    encoder = {"kind": "buckets", "count": 2, "step": 0.01}
    changes: dict[str, Any] = {
        "context": [{"name": "years", "table": "users", "encoder": encoder}],
        "user_table": {"files": [str(tmp_path / "users.parquet")]},
    }
    manifest = ingest(given, tmp_path / "log", plan(**changes))
    assert manifest.context["years"].encoder == Buckets(kind="buckets", edges=(30.25,), step=0.01)
    told = report_lines(manifest)
    assert "context years: numbers, 20 to 30.25; 1 of 3 missing, 0 beyond the range" in told
    rounded = (
        "age is read as numbers: 1 are rounded to whole numbers for age; give its encoder a step to keep more"
    )
    assert any(rounded in line for line in told), told


def test_the_preview_shows_what_lies_beyond_a_range_apart_from_nulls(tmp_path: Path) -> None:
    given = write_ages(tmp_path / "events.csv", ["-3.5", "", "1e3", "inf", *["30"] * 8])
    encoder = {"kind": "mnse", "range": [0, 100], "step": 0.5}
    told: list[str] = []
    preview(given, plan(features=[{"name": "age", "encoder": encoder, "side": "history"}]), told.append)
    head, *_ = [re.split("  +", line.strip()) for line in told if "named by" in line]
    (age,) = [re.split("  +", line.strip()) for line in told if line.startswith("  age")]
    assert dict(zip(head[4:], age[4:], strict=True)) == {
        "nulls": "1",
        "from": "-3.5",
        "to": "1000",
        "beyond range": "3",
    }
