"""Small streams: a folder with a manifest and windows that appear one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.logs import Row, Shape, manifest_of, random_rows
from trainer.data.stream.folder import WINDOWS
from trainer.log.schema import FeatureInfo, LogManifest, schema_of
from trainer.log.writer import write_manifest


def write_stream(path: Path, **features: FeatureInfo) -> Path:
    """A stream without a window; `features`: that are other than in `manifest_of`."""
    known = manifest_of()
    path.mkdir(parents=True)
    (path / WINDOWS).mkdir()
    write_manifest(path, known.model_copy(update={"features": {**known.features, **features}}))
    return path


def add_window(stream: Path, name: str, rows: Sequence[Row], manifest: LogManifest | None = None) -> Path:
    """Have a window appear, by a rename as its writers should."""
    table = pa.Table.from_pylist(list(rows), schema=schema_of(manifest or manifest_of()))
    part, file = (stream / WINDOWS / each for each in (f".{name}.tmp", f"{name}.parquet"))
    pq.write_table(table, part, row_group_size=3)
    return part.rename(file)


def rows_of(number: int, users: int = 6, **changes: Any) -> list[Row]:
    """Rows of a window; those of later numbers come later."""
    rows = random_rows(100 + number, Shape(users=users, **changes))
    for row in rows:
        for key in ("history_timestamp", "request_timestamp"):
            row[key] = [time + 100_000 * number for time in row[key]]
    return rows
