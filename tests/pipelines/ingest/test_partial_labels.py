"""Labels that only a part of the impressions has, and weights of one label."""

from __future__ import annotations

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import DataError
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import PARTIAL, SHOWN, as_parquet, config, events, partly_known, rows, write

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def test_a_label_that_was_not_observed_is_null_in_the_log(tmp_path: Path) -> None:
    raw = partly_known()
    given = as_parquet(tmp_path / "i.parquet", raw, (*SHOWN, "worth"))
    plan = config("impressions", requests={"min_history": 0}, impressions={"labels": PARTIAL})
    manifest = ingest(write(tmp_path / "e.parquet", events()), tmp_path / "log", plan, impressions=given)
    assert (manifest.partial, manifest.label_weights) == (["buy"], ["buy"])
    found = [
        one
        for row in rows(tmp_path / "log")
        for lists in zip(row["label_click"], row["label_buy"], row["weight_buy"], strict=True)
        for one in zip(*lists, strict=True)
    ]

    def cell(row: dict[str, Any]) -> tuple[float, float | None, float]:
        buy = row["buy"]
        known = buy if buy is not None and not math.isnan(buy) else None
        return float(row["click"]), known, row["worth"] or 0.0

    assert Counter(found) == Counter(cell(row) for row in raw)
    known = [buy for _, buy, _ in found if buy is not None]
    counted = [info.labels["buy"] for info in manifest.splits.values()]
    assert sum(one.observed for one in counted) == len(known)
    assert sum(one.positives for one in counted) == sum(known)
    lines = report_lines(manifest)
    told = f"{int(sum(known)):,} of {len(known):,} impressions (of {len(raw):,}) in which it was observed"
    assert f"label buy: {told} are positive" in lines
    train = manifest.splits["train"].labels["buy"]
    told = f"label buy, positives of the observed: train {train.positives} of {train.observed},"
    assert any(line.startswith(told) for line in lines)


def test_a_partial_label_of_csv_is_that_of_parquet(tmp_path: Path) -> None:
    raw, names = partly_known(), (*SHOWN, "worth")
    with (tmp_path / "i.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(raw)  # None is an empty cell, NaN the word nan
    plan = config("impressions", impressions={"labels": PARTIAL})
    source = write(tmp_path / "e.parquet", events())
    for given in (tmp_path / "i.csv", as_parquet(tmp_path / "i.parquet", raw, names)):
        ingest(source, tmp_path / given.suffix, plan, impressions=given)
    assert rows(tmp_path / ".csv") == rows(tmp_path / ".parquet") != []


LACKING: dict[str, tuple[Any, dict[str, Any], str]] = {
    "not declared": ("buy", {}, "column buy: null in 47 of .* declare the label with partial = true"),
    "no weight": (PARTIAL["buy"], {"worth": None}, r"column worth: null in \d+ rows that have the label"),
    "bad weight": (
        PARTIAL["buy"],
        {"worth": -1.0},
        r"column worth: -1 is negative, and a weight is at least",
    ),
    "bad label": (PARTIAL["buy"], {"buy": 7.0}, r"column buy: holds 7 to 7.*the first is in row 0"),
    "no label": (PARTIAL["buy"], {"buy": None}, ""),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_a_partial_label_may_lack(case: str, tmp_path: Path) -> None:
    label, changes, message = LACKING[case]
    given = as_parquet(
        tmp_path / "i.parquet", [{**row, **changes} for row in partly_known()], (*SHOWN, "worth")
    )
    plan = config("impressions", impressions={"labels": {"click": "click", "buy": label}})
    source = write(tmp_path / "e.parquet", events())
    if message:
        with pytest.raises(DataError, match=message):
            ingest(source, tmp_path / "log", plan, impressions=given)
        return
    lines = report_lines(ingest(source, tmp_path / "log", plan, impressions=given))
    assert "WARNING: label buy was observed nowhere: nothing can be learnt from it" in lines
    assert "WARNING: label buy was observed nowhere in the split test" in lines


def test_a_weight_column_takes_no_name_of_a_feature() -> None:
    with pytest.raises(ValueError, match="give the name 'weight_buy' twice"):
        config(
            "impressions",
            impressions={"labels": PARTIAL},
            features=[{"name": "weight_buy", "side": "candidate"}],
        )
