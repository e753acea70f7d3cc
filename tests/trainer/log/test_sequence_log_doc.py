"""docs/sequence_log.md against the code that writes and reads the format."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.logs import CONTEXT, RICH, manifest_of
from trainer.data.rows import Columns
from trainer.log.clusters import ClusterInfo
from trainer.log.schema import schema_of

DOC = (Path(__file__).parents[3] / "docs" / "sequence_log.md").read_text(encoding="utf-8")
SCHEMA = schema_of(manifest_of(rich=True, tasks=["click"], clusters=ClusterInfo(chunk=2, cap=1)))
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
    columns = Columns(RICH, ["click"], CONTEXT, ["price"], True, chunk=5)
    planned = {"num_behaviors", "num_requests", "num_candidates"}
    assert set(columns.names()) == set(SCHEMA.names) - planned


def test_nothing_is_nullable() -> None:
    for field in SCHEMA:
        kind = field.type
        assert not field.nullable
        while hasattr(kind, "value_field"):
            assert not kind.value_field.nullable, field.name
            kind = kind.value_type
