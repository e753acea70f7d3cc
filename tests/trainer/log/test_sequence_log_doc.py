"""docs/sequence_log.md against the code that writes and reads the format."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.helpers.logs import CONTEXT, RICH, enrich, manifest_of, random_rows
from trainer.data.rows import Columns
from trainer.log.clusters import ClusterInfo
from trainer.log.schema import schema_of
from trainer.log.writer import write_split

DOC = (Path(__file__).parents[3] / "docs" / "sequence_log.md").read_text(encoding="utf-8")
FACTS: dict[str, Any] = {"tasks": ["click"], "clusters": ClusterInfo(chunk=2, cap=1)}
SCHEMA = schema_of(manifest_of(rich=True, label_weights=["click"], **FACTS))
PATTERNS = {
    "feature": "|".join([*RICH, *CONTEXT]),
    "name": "price",
    "task": "click",
}


def documented() -> list[re.Pattern[str]]:
    table = DOC.split("## Columns")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return [re.compile(re.sub(r"<(\w+)>", lambda found: f"({PATTERNS[found[1]]})", name)) for name in names]


def test_every_column_is_documented_and_nothing_else() -> None:
    patterns = documented()
    for column in SCHEMA.names:
        assert sum(bool(pattern.fullmatch(column)) for pattern in patterns) == 1, column
    for pattern in patterns:
        assert any(pattern.fullmatch(column) for column in SCHEMA.names), pattern.pattern


def test_the_reader_reads_what_the_schema_declares() -> None:
    columns = replace(Columns.of(manifest_of(rich=True, **FACTS)), chunk=5)
    planned = {"num_behaviors", "num_requests", "num_candidates"}
    assert set(columns.names()) == set(schema_of(manifest_of(rich=True, **FACTS)).names) - planned


def nullable(field: pa.Field) -> list[bool]:
    """Whether the column, the items of its lists, the items of those, ... may be null."""
    kind = field.type
    return [field.nullable, *(nullable(kind.value_field) if hasattr(kind, "value_field") else [])]


def test_nothing_is_nullable_but_partial_labels() -> None:
    schema = schema_of(manifest_of(rich=True, partial=["buy"]))
    for field in schema:
        where = nullable(field)
        assert where[:-1] == [False] * (len(where) - 1)
        assert where[-1] == (field.name == "label_buy"), field.name
    assert {field.name for field in schema} >= {"label_click", "label_buy"}


def test_a_manifest_names_only_labels_that_it_has() -> None:
    for name in ("partial", "label_weights"):
        with pytest.raises(ValueError, match=f"{name} names labels that the log does not have: like"):
            manifest_of(**{name: ["like"]})


def test_labels_that_nobody_observed_are_not_counted(tmp_path: Path) -> None:
    manifest = manifest_of(rich=True, partial=["buy"])
    given = enrich(random_rows(0), 0)
    for row in given:
        row["label_buy"] = [
            [(None, math.nan, one)[place % 3] for place, one in enumerate(labels)]
            for labels in row["label_buy"]
        ]
    known = [one for row in given for labels in row["label_buy"] for one in labels[2::3]]
    batches = pa.Table.from_pylist(given, schema=schema_of(manifest)).to_batches()
    info = write_split(batches, tmp_path, "train", schema_of(manifest), (3, 6))
    buy, click = info.labels["buy"], info.labels["click"]
    assert (buy.observed, buy.positives) == (len(known), sum(known))
    assert (click.observed, click.positives) == (info.candidates, info.positives)
    assert 0 < buy.positives < buy.observed < click.observed
