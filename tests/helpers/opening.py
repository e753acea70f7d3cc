"""Raw tables as ingest opens them, without the log that it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine, connect
from pipelines.ingest.events import open_events, open_impressions
from pipelines.ingest.files import Files, find_files
from pipelines.ingest.sections import EngineConfig
from pipelines.ingest.sources import Survey
from tests.helpers.rawlogs import START, Row

GOOD: dict[str, Any] = {
    "user_id": [1, 2, 3],
    "item_id": [7, 8, 9],
    "timestamp": [START, START + 1, START + 2],
}


def plan(**changes: Any) -> IngestConfig:
    tree: dict[str, Any] = {
        "protocol": "time-split",
        "split": {"validation": "2017-01-06", "test": "2017-01-09"},
        "requests": {"min_history": 1, "negatives": 1},
        "engine": {"threads": 1, "memory_limit": "500MB"},
    }
    return IngestConfig.model_validate(tree | changes)


def parquet(path: Path, **columns: Any) -> Path:
    """Three good events; `columns` are further ones, or replace these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**GOOD, **columns}), path)
    return path


def text(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_text(end.join([*lines, ""]), encoding="utf-8", newline="")
    return path


class Door:
    """One engine for many openings: to start one takes longer than to open a file."""

    def __init__(self, folder: Path, engine: str = "duckdb") -> None:
        self.engine: Engine = connect(engine, EngineConfig(threads=1, memory_limit="500MB"), folder / "spill")
        self.survey = Survey()

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def events(self, files: Files, **changes: Any) -> list[Row]:
        """The rows in the order of their times."""
        self.survey = Survey()
        table = open_events(self.engine, find_files(files, "raw events"), plan(**changes), self.survey)
        return self._rows(table)

    def shown(self, files: Files, **changes: Any) -> list[Row]:
        self.survey = Survey()
        given = plan(protocol="impressions", **changes)
        return self._rows(open_impressions(self.engine, find_files(files, "impressions"), given, self.survey))

    def column(self, files: Files, name: str, **changes: Any) -> list[Any]:
        return [row[name] for row in self.events(files, **changes)]

    def _rows(self, table: Any) -> list[Row]:
        return sorted(self.engine.rows(table), key=lambda row: (row["timestamp"], str(row["item_id"])))


def csv_events(items: Sequence[str], header: str = "user_id,item_id,timestamp") -> list[str]:
    """Lines of a CSV file with one event an item."""
    return [header, *(f"{place},{item},{START + place}" for place, item in enumerate(items))]
