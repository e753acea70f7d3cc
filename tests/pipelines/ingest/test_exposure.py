"""Weights of repeated exposures, beside a plain loop over impressions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ibis.expr import types as ir

from embeddings.errors import ConfigError
from pipelines.ingest.engine import Engine, connect
from pipelines.ingest.exposure import EXPOSURES, weighted, with_exposures
from pipelines.ingest.exposure_config import ExposureConfig
from pipelines.ingest.ingest import ingest, report_lines
from pipelines.ingest.sections import EngineConfig
from tests.helpers.rawlogs import (
    DAY,
    PARTIAL,
    SHOWN,
    START,
    Row,
    as_parquet,
    config,
    events,
    ids_of_values,
    impressions,
    partly_known,
    rows,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")

RULES = [
    ExposureConfig(),
    ExposureConfig(rate=0.1, window_days=2),
    ExposureConfig(rule="table", weights=(1.0, 0.5, 0.0), window_days=1),
    ExposureConfig(rule="table", weights=(0.25,)),
]


def exposures(row: Row, shown: list[Row], feature: str, rule: ExposureConfig) -> int:
    """n by its definition: the request's second is that of its earliest impression."""
    asked = min(
        one["timestamp"]
        for one in shown
        if (one["user_id"], one["request"]) == (row["user_id"], row["request"])
    )
    earlier = [
        one
        for one in shown
        if one["user_id"] == row["user_id"]
        and one[feature] == row[feature]
        and one["timestamp"] < asked
        and (not rule.window_days or one["timestamp"] >= asked - rule.window_days * DAY)
    ]
    return len(earlier) if row[feature] else 0


def weight(n: int, label: float | None, own: float, rule: ExposureConfig) -> float:
    """As docs/ingest.md has it."""
    if label is None or math.isnan(label) or label >= 0.5:
        return float(np.float32(own))
    factor = (
        1 / (1 + rule.rate * n) if rule.rule == "hyperbolic" else rule.weights[min(n, len(rule.weights) - 1)]
    )
    return float(np.float32(own * factor))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with closing(connect("duckdb", EngineConfig(threads=1), tmp_path_factory.mktemp("spill"))) as opened:
        yield opened


def kept(engine: Engine, columns: pa.Table, folder: Path) -> ir.Table:
    """A table of the engine."""
    pq.write_table(columns, folder / "shown.parquet")
    kinds = ibis.Schema.from_pyarrow(columns.schema)
    return engine.keep("shown", engine.query(f"SELECT * FROM '{folder / 'shown.parquet'}'", kinds))


# Times are around whole days from one another, so that windows begin and end at impressions.
TIMES = st.builds(lambda day, second: START + day * DAY + second, st.integers(0, 3), st.integers(0, 1))
IMPRESSION = st.fixed_dictionaries(
    {
        "user_id": st.integers(1, 2),
        "request": st.integers(0, 3),
        "item_id": st.integers(1, 2),
        "timestamp": TIMES,
        "click": st.sampled_from([0.0, 0.4, 0.5, 1.0, None]),
        "buy": st.sampled_from([0.0, 1.0]),
        "worth": st.sampled_from([0.0, 0.5, 3.0]),
    }
)


@settings(max_examples=25, deadline=None)
@given(
    shown=st.lists(IMPRESSION, min_size=1, max_size=25),
    rule=st.sampled_from(RULES),
    least=st.integers(0, 2),
)
def test_exposures_are_those_of_a_plain_loop(
    shown: list[Row],
    rule: ExposureConfig,
    least: int,
    engine: Engine,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    columns: dict[str, pa.Array] = {
        name: pa.array([row[name] for row in shown], pa.int64())
        for name in ("user_id", "item_id", "timestamp")
    }
    columns["request_id"] = pa.array([row["request"] for row in shown], pa.int64())
    columns["number"] = pa.array(range(len(shown)), pa.int64())
    for name in ("click", "buy"):
        columns[f"label_{name}"] = pa.array([row[name] for row in shown], pa.float32())
    columns["weight_buy"] = pa.array([row["worth"] for row in shown], pa.float32())
    table = kept(engine, pa.table(columns), tmp_path_factory.getbasetemp())
    requests = table.group_by(["user_id", "request_id"]).aggregate(timestamp=table.timestamp.min())
    # Impressions of requests that are not asked count all the same.
    asked = requests.filter(requests.request_id >= least)
    counted = with_exposures(table, asked, None, rule)
    done = weighted(counted.mutate(n=counted[EXPOSURES]), ("click", "buy"), rule)
    assert EXPOSURES not in done.columns
    found = {row["number"]: row for row in engine.rows(done)}
    expected = {number: row for number, row in enumerate(shown) if row["request"] >= least}
    assert found.keys() == expected.keys()
    for number, row in expected.items():
        n = exposures(row, shown, "item_id", rule)
        assert found[number]["n"] == n
        assert found[number]["weight_click"] == weight(n, row["click"], 1.0, rule)
        assert found[number]["weight_buy"] == weight(n, row["buy"], row["worth"], rule)


def cells(log: Path) -> Counter[tuple[Any, ...]]:
    """User, request, item, weights and labels of each candidate."""
    found: Counter[tuple[Any, ...]] = Counter()
    for row in rows(log):
        names = ("candidate_item_id", "label_click", "weight_click", "label_buy", "weight_buy")
        for place, request in enumerate(row["request_id"]):
            ones = [1.0] * len(row["label_click"][place])
            weights = row["weight"][place] if "weight" in row else ones
            parts = zip(*(row[name][place] for name in names), weights, strict=True)
            found.update((row["user_id"], request, *part) for part in parts)
    return found


@pytest.mark.parametrize(
    ("feature", "buckets", "weighted"), [("item_id", 3, True), ("slot", 1, False), ("kind", 1, True)]
)
def test_a_log_has_the_weights_and_says_what_they_do(
    feature: str, buckets: int, weighted: bool, tmp_path: Path
) -> None:
    shown = [{**row, "kind": row["item_id"] % 3 + 1} for row in partly_known()]
    pq.write_table(pa.table({"item_id": range(1001, 1035), "kind": [n % 3 + 1 for n in range(1001, 1035)]}),
                   tmp_path / "items.parquet")  # fmt: skip
    exposure = {"feature": feature, "window_days": 3, "rule": "table", "weights": [1.0, 0.5, 0.25]}
    plan = config(
        "impressions",
        impressions={"labels": PARTIAL, "exposure": exposure, "weight": "importance" if weighted else ""},
        requests={"min_history": 0},
        features=[{"name": "slot", "side": "candidate"}, {"name": "kind"}],
        item_table={"files": [str(tmp_path / "items.parquet")]},
        engine={"buckets": buckets},
    )
    given_ = as_parquet(tmp_path / "i.parquet", shown, (*SHOWN, "worth"))
    source = write(tmp_path / "e.parquet", events())
    manifest = ingest(source, tmp_path / "log", plan, impressions=given_)
    assert manifest.label_weights == ["click", "buy"]
    assert manifest.weighted == weighted
    rule, items = ExposureConfig(**exposure), ids_of_values(tmp_path / "log", "item_id")
    counts = [exposures(row, shown, feature, rule) for row in shown]
    expected = Counter(
        (
            row["user_id"],
            row["request"],
            items[row["item_id"]],
            float(row["click"]),
            weight(n, row["click"], 1.0, rule),
            None if row["buy"] is None or math.isnan(row["buy"]) else row["buy"],
            weight(n, row["buy"], row["worth"] or 0.0, rule),
            row["importance"] if weighted else 1.0,
        )
        for row, n in zip(shown, counts, strict=True)
    )
    assert cells(tmp_path / "log") == expected
    report = manifest.report["exposure"]
    assert sum(report["histogram"].values()) == len(shown)
    assert report["histogram"]["0"] == counts.count(0) < len(shown)
    for task, place in (("click", 4), ("buy", 6)):
        after = sum(
            cell[place] * cell[7] * times
            for cell, times in expected.items()
            if task == "click" or cell[5] is not None
        )
        told = [split[task]["after"] for split in report["weights"].values()]
        assert sum(told) == pytest.approx(after, abs=0.01)
        assert all(split[task]["after"] < split[task]["before"] for split in report["weights"].values())
    lines = report_lines(manifest)
    told = f"earlier exposures of {feature} to the user within 3 days: candidates: 0: {counts.count(0):,}"
    assert any(line.startswith(told) for line in lines)
    assert any(line.startswith("label buy, train: weights add up to") for line in lines)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no feature": ({"feature": "creative"}, "'creative' is no feature of candidates; they have item_id"),
    "of events": ({"feature": "action"}, "'action' is no feature of candidates"),
    "several": ({"feature": "tags"}, "'tags' has several values in a candidate"),
    "no weights": ({"rule": "table"}, "needs weights"),
    "both": ({"rule": "table", "weights": [1], "rate": 2}, "does not read rate"),
    "other": ({"weights": [1]}, "does not read weights"),
    "negative": ({"rule": "table", "weights": [1, -1]}, "greater than or equal to 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_rule_may_not_say(case: str) -> None:
    exposure, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        config("impressions", impressions={"exposure": exposure})


def test_a_feature_that_only_events_have_is_refused(tmp_path: Path) -> None:
    plan = config("impressions", impressions={"exposure": {"feature": "category_id"}})
    source = write(tmp_path / "e.parquet", events())
    given_ = as_parquet(tmp_path / "i.parquet", impressions(), SHOWN)
    with pytest.raises(ConfigError, match="neither the impressions nor the item table has this column"):
        ingest(source, tmp_path / "log", plan, impressions=given_)
    assert not (tmp_path / "log").exists()


def test_exposure_weights_take_no_name_of_a_feature() -> None:
    with pytest.raises(ValueError, match="give the name 'weight_click' twice"):
        config(
            "impressions",
            impressions={"exposure": {}},
            features=[{"name": "weight_click", "side": "candidate"}],
        )
