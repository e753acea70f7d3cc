"""Requests and answers as Arrow IPC streams: no parsing of numbers, which is most of the cost of JSON.

One row a request. The columns are those of the sequence log: `user_id`, `request_timestamp`,
`history_timestamp`, `history_<feature>`, `candidate_<feature>`, `context_<feature>`, `numeric_<name>`,
`cluster_size`, `cluster_time`; a list of lists where a behavior or candidate has several ids.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from trainer.data.row_group import PARQUET_ERRORS, Bags, Ints
from trainer.serving.request import (
    Doubles,
    History,
    Limits,
    Needs,
    Request,
    RequestError,
    checked,
    stored_history,
)
from trainer.serving.scorer import Scored

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_RECORD_BATCH = 3
_COMPRESSION_SLOT = 10  # of field 3 in the vtable of Arrow's RecordBatch


def read_arrow(body: bytes, stored: Mapping[int, History], needs: Needs, limits: Limits) -> list[Request]:
    """Requests of an Arrow IPC stream, checked.

    Raises:
        RequestError: 413 above a limit, 404 for an unknown user, 422 for anything else.
    """
    table = _table(body, limits)
    return [_request(table, row, stored, needs, limits) for row in range(table.num_rows)]


def write_arrow(scored: Sequence[Scored], tasks: Sequence[str], version: str) -> bytes:
    """One row a request: `score_<task>`, a list of float32; the version in the schema's metadata."""
    columns = {
        f"score_{task}": pa.array([part.probabilities[:, t] for part in scored], pa.list_(pa.float32()))
        for t, task in enumerate(tasks)
    }
    table = pa.table(columns).replace_schema_metadata({"version": version})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _table(body: bytes, limits: Limits) -> pa.Table:
    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(body) as reader:
            batches = []
            rows = 0
            for batch in reader:
                rows += batch.num_rows
                if rows > limits.requests:
                    raise RequestError(413, f"more than {limits.requests} requests (--max-requests)")
                batch.validate(full=True)
                batches.append(batch)
            table = pa.Table.from_batches(batches, reader.schema).combine_chunks()
    except (*PARQUET_ERRORS, struct.error, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RequestError(422, f"no Arrow IPC stream: {reason}") from None
    if not table.num_rows:
        raise RequestError(422, "there is no request: the stream has no rows")
    names = table.column_names
    if len(set(names)) != len(names):
        raise RequestError(422, "a column occurs twice")
    return table


def _refuse_compressed(body: bytes) -> None:
    """A compressed buffer of a few bytes may claim to become gigabytes, and Arrow would allocate them."""
    source = pa.BufferReader(body)
    while source.tell() < len(body):
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        meta = memoryview(message.metadata)
        root = struct.unpack_from("<I", meta, 0)[0]
        vtable = root - struct.unpack_from("<i", meta, root)[0]
        kind_at, header_at = struct.unpack_from("<HH", meta, vtable + 6)
        if not kind_at or not header_at or meta[root + kind_at] != _RECORD_BATCH:
            continue
        header = root + header_at + struct.unpack_from("<I", meta, root + header_at)[0]
        vtable = header - struct.unpack_from("<i", meta, header)[0]
        size = struct.unpack_from("<H", meta, vtable)[0]
        slot = _COMPRESSION_SLOT
        if size > slot and struct.unpack_from("<H", meta, vtable + slot)[0]:
            raise RequestError(422, "compressed Arrow bodies are not accepted; write it uncompressed")


class _Row:
    """One row of the table; every value is checked for its type and for nulls when it is taken."""

    def __init__(self, table: pa.Table, row: int) -> None:
        self.table, self.row, self.place = table, row, f"requests[{row}]"

    def fail(self, name: str, problem: str) -> RequestError:
        return RequestError(422, f"{self.place}, column {name}: {problem}")

    def items(self, name: str) -> pa.Array:
        """Items of a list, without nulls."""
        cell = self._cell(name)
        if not isinstance(cell, pa.ListScalar | pa.LargeListScalar):
            raise self.fail(name, f"is {cell.type}, expected a list")
        return self._whole(name, cell.values)

    def ints(self, name: str, values: pa.Array | None = None) -> Ints:
        values = self.items(name) if values is None else values
        if not pa.types.is_integer(values.type) or pa.types.is_uint64(values.type):
            raise self.fail(name, f"holds {values.type}, expected int64")
        ids: Ints = values.to_numpy(zero_copy_only=False).astype(np.int64, copy=False)
        return ids

    def bags(self, name: str) -> Bags:
        values = self.items(name)
        if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
            return Bags(self.ints(name, values))
        offsets = values.offsets.to_numpy().astype(np.int64)
        inner = self._whole(name, values.values.slice(offsets[0], offsets[-1] - offsets[0]))
        return Bags(self.ints(name, inner), offsets - offsets[0])

    def one_bag(self, name: str) -> Bags:
        cell = self._cell(name)
        is_list = isinstance(cell, pa.ListScalar | pa.LargeListScalar)
        values = self.items(name) if is_list else pa.array([cell.as_py()], cell.type)
        ids = self.ints(name, values)
        return Bags(ids, np.array([0, ids.size]))

    def floats(self, name: str) -> Doubles:
        values = self.items(name)
        if not pa.types.is_floating(values.type):
            raise self.fail(name, f"holds {values.type}, expected float32")
        numbers: Doubles = values.to_numpy(zero_copy_only=False).astype(np.float64)
        return numbers

    def whole(self, name: str) -> int | None:
        """A single number, or None where the column or the value is missing."""
        if name not in self.table.column_names:
            return None
        column = self.table.column(name)
        if not pa.types.is_integer(column.type) or pa.types.is_uint64(column.type):
            raise self.fail(name, f"is {column.type}, expected int64")
        found: int | None = column[self.row].as_py()
        return found

    def after(self, prefix: str) -> list[str]:
        return [n.removeprefix(prefix) for n in self.table.column_names if n.startswith(prefix)]

    def _cell(self, name: str) -> pa.Scalar:
        cell = self.table.column(name)[self.row]
        if not cell.is_valid:
            raise self.fail(name, "is null")
        return cell

    def _whole(self, name: str, values: pa.Array) -> pa.Array:
        if values.null_count:
            raise self.fail(name, "holds a null")
        return values


def _request(
    table: pa.Table, number: int, stored: Mapping[int, History], needs: Needs, limits: Limits
) -> Request:
    row = _Row(table, number)
    user, when = row.whole("user_id"), row.whole("request_timestamp")
    if "history_timestamp" in table.column_names:
        history = History(
            row.ints("history_timestamp"),
            {name: row.bags(f"history_{name}") for name in needs.features if name in row.after("history_")},
            *(row.ints(n) if n in table.column_names else None for n in ("cluster_size", "cluster_time")),
        )
    else:
        history = stored_history(stored, user, row.place)
    candidates = {
        name: row.bags(f"candidate_{name}") for name in needs.features if name in row.after("candidate_")
    }
    sizes = [b.values.size if b.offsets is None else b.offsets.size - 1 for b in candidates.values()]
    newest = int(history.time[-1]) if history.time.size else 0
    request = Request(
        user_id=user or 0,
        history=history,
        time=min(newest, 2**63 - 2) + 1 if when is None else when,
        candidates=candidates,
        count=max(sizes, default=0),
        context={n: row.one_bag(f"context_{n}") for n in needs.context if n in row.after("context_")},
        numeric={n: row.floats(f"numeric_{n}") for n in needs.numeric if n in row.after("numeric_")},
    )
    return checked(request, needs, limits, row.place)
