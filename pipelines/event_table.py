"""Opens and checks the raw event table before anything is computed from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ibis.expr import types as ir

from embeddings.errors import DataError
from trainer.data.ingest_config import IngestConfig

_YEAR_5000 = 95_617_584_000  # unix seconds; a larger timestamp is in milli- or microseconds


def open_events(engine: Any, path: Path, config: IngestConfig) -> ir.Table:
    """The events as user_id, request_id, timestamp (int64) and one raw column a feature.

    Args:
        engine: the Ibis backend that reads the file.

    Raises:
        DataError: the file or a column is missing, of a wrong type, or holds impossible values.
    """
    columns = config.events
    _check_columns(path, config)
    table = engine.read_parquet(str(path))
    raw = table.select(
        user_id=table[columns.user].cast("int64"),
        request_id=table[columns.request or columns.timestamp].cast("int64"),
        timestamp=table[columns.timestamp].cast("int64"),
        **{feature: table[column] for feature, column in columns.features.items()},
    )
    _check_values(raw, path, config)
    return raw


def _check_columns(path: Path, config: IngestConfig) -> None:
    try:
        schema = pq.read_schema(path)
    except FileNotFoundError as error:
        raise DataError("no such file; name the Parquet file of raw events", file=path) from error
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not readable as one Parquet file: {error}", file=path) from error
    columns = config.events
    whole = {"user": columns.user, "timestamp": columns.timestamp}
    if columns.request:
        whole["request"] = columns.request
    ids = {"item": columns.item, **{f"taxonomy: {column}": column for column in columns.taxonomy}}
    for key, column in {**whole, **ids}.items():
        if column not in schema.names:
            problem = f"no such column (events.{key}); the file has {', '.join(schema.names)}"
            raise DataError(problem, file=path, column=column)
        kind = schema.field(column).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if not pa.types.is_integer(kind) and (key in whole or not text):
            wanted = "an integer" if key in whole else "an integer or a string"
            hint = ", in unix seconds" if key == "timestamp" else ""
            problem = f"type is {kind}, expected {wanted}{hint}; cast the column"
            raise DataError(problem, file=path, column=column)


def _check_values(raw: ir.Table, path: Path, config: IngestConfig) -> None:
    columns = config.events
    required = {"user_id": columns.user, "item_id": columns.item, "timestamp": columns.timestamp}
    nulls = {name: raw[name].isnull().sum() for name in required}
    found = raw.aggregate(rows=raw.count(), latest=raw.timestamp.max(), **nulls).to_pyarrow().to_pylist()[0]
    if not found["rows"]:
        raise DataError("has no rows; ingest needs events", file=path)
    for name, column in required.items():
        if found[name]:
            problem = f"null in {int(found[name]):,} of {found['rows']:,} rows; remove or fill them"
            raise DataError(problem, file=path, column=column)
    if found["latest"] > _YEAR_5000:
        problem = f"{found['latest']} is too large for unix seconds; divide milliseconds by 1,000"
        raise DataError(problem, file=path, column=columns.timestamp)
