"""Requests and answers as Arrow IPC streams: no parsing of numbers, which is most of the cost of JSON.

One row a request. The columns are those of the sequence log: `user_id`, `request_timestamp`,
`history_timestamp`, `history_<feature>`, `candidate_<feature>`, `context_<feature>`, `numeric_<name>`,
`cluster_size`, `cluster_time`; a list of lists where a behavior or candidate has several ids. Lists may be of
any of Arrow's kinds, and ids dictionaries. Raw values instead of ids are announced by `ids: raw` in the
metadata of the schema.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.data.row_group import PARQUET_ERRORS, Bags, Ints
from trainer.log.arrow_types import is_list, is_text
from trainer.serving.arrow_meta import check_messages
from trainer.serving.asked import Doubles, History, Limits, Needs, Request, RequestError
from trainer.serving.checks import check_names, checked, size_of
from trainer.serving.request import time_of
from trainer.serving.scorer import Scored
from trainer.serving.users import as_user, names_of, number_sent, stored_history
from trainer.serving.vocabulary import Translation, Vocabulary, check_text

MEDIA_TYPE = "application/vnd.apache.arrow.stream"


def read_arrow(
    body: bytes | memoryview,
    stored: Mapping[int, History],
    needs: Needs,
    limits: Limits,
    vocabularies: Mapping[str, Vocabulary] | None = None,
    users: Vocabulary | None = None,
) -> list[Request]:
    """Requests of an Arrow IPC stream, checked.

    Args:
        stored: histories by user id; users: their names, where the log has names.
        vocabularies: of the features whose raw values may be sent.

    Raises:
        RequestError: 413 above a limit, 404 for an unknown user, 422 for anything else.
    """
    requests: list[Request] = []
    left = _Left(limits.ids)
    try:
        check_messages(body)
        with pa.ipc.open_stream(body) as reader:
            raw = _is_raw(reader.schema)
            for batch in reader:
                if len(requests) + batch.num_rows > limits.requests:
                    raise RequestError(413, f"more than {limits.requests} requests (--max-requests)")
                columns = _needed(batch, needs)
                for row in range(columns.num_rows):
                    translation = Translation(vocabularies or {}, users) if raw else None
                    cells = _Row(columns, row, len(requests), left, translation)
                    requests.append(_request(cells, stored, needs, limits))
    except (*PARQUET_ERRORS, struct.error, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RequestError(422, f"no Arrow IPC stream: {reason}") from None
    if not requests:
        raise RequestError(422, "there is no request: the stream has no rows")
    return requests


def _is_raw(schema: pa.Schema) -> bool:
    if len(set(schema.names)) != len(schema.names):
        raise RequestError(422, "a column occurs twice")
    said = (schema.metadata or {}).get(b"ids", b"dense")
    if said not in (b"dense", b"raw"):
        raise RequestError(422, f"the schema's metadata says ids: {said[:40]!r}; dense and raw are known")
    return bool(said == b"raw")


def write_arrow(scored: Sequence[Scored], tasks: Sequence[str], version: str) -> bytes:
    """One row a request; the version is in the schema's metadata.

    `score_<task>` is a list of float32, `history_used` how many behaviors the model could see, and
    `unknown` how many raw values stand for no id.
    """
    columns = {
        f"score_{task}": pa.array([part.probabilities[:, t] for part in scored], pa.list_(pa.float32()))
        for t, task in enumerate(tasks)
    }
    columns["history_used"] = pa.array([part.history_used for part in scored], pa.int64())
    columns["unknown"] = pa.array([sum(part.unknown.values()) for part in scored], pa.int64())
    table = pa.table(columns).replace_schema_metadata({"version": version})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _needed(batch: pa.RecordBatch, needs: Needs) -> pa.RecordBatch:
    """The columns that are read, each checked to be what it says."""
    known = ["user_id", "request_timestamp", "history_timestamp", "cluster_size", "cluster_time"]
    known += [f"{side}_{name}" for side in ("history", "candidate") for name in needs.features]
    known += [f"context_{name}" for name in needs.context] + [f"numeric_{name}" for name in needs.numeric]
    _check_names(batch.schema.names, needs)
    there = set(batch.schema.names)
    batch = batch.select([name for name in known if name in there])
    for name in batch.schema.names:
        values, shared = batch.column(name), False
        while is_list(values.type):
            shared = shared or pa.types.is_list_view(values.type) or pa.types.is_large_list_view(values.type)
            values = values.values
        # Many lists may share one long text, and views refer to it, a million times.
        if shared and _is_text(values.type) and not pa.types.is_dictionary(values.type):
            raise RequestError(422, f"column {name}: holds text in list views; write plain lists")
        values = values.dictionary if pa.types.is_dictionary(values.type) else values
        if not _is_read(values.type):
            raise RequestError(422, f"column {name}: holds {values.type}")
        check_text(values, f"column {name}")
        batch.column(name).validate(full=True)
    return batch


def _check_names(columns: Sequence[str], needs: Needs) -> None:
    sides = [("candidate_", needs.features, needs.candidate), ("context_", needs.context, needs.context)]
    sides += [("numeric_", needs.numeric, needs.numeric)]
    if "history_timestamp" in columns:
        sides.append(("history_", needs.features, needs.behavior))
    for prefix, known, needed in sides:
        given = [name.removeprefix(prefix) for name in columns if name.startswith(prefix)]
        check_names([name for name in given if name != "timestamp"], known, needed, f"columns {prefix}*")


class _Left:
    """How many values a body may still hold; rows may share the same ones, and then each counts."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise RequestError(413, f"more values than the server takes, {self.most:,} (--max-ids)")


class _Row:
    """One row of a batch; every value is checked for its type and for nulls when it is taken."""

    def __init__(
        self, batch: pa.RecordBatch, row: int, number: int, left: _Left, translation: Translation | None
    ) -> None:
        self.batch, self.row, self.left, self.translation = batch, row, left, translation
        self.place, self.names = f"requests[{number}]", set(batch.schema.names)

    def fail(self, name: str, problem: str) -> RequestError:
        return RequestError(422, f"{self.place}, column {name}: {problem}")

    def items(self, name: str) -> pa.Array:
        """Items of a list, without nulls."""
        column = self._column(name)
        if not is_list(column.type):
            raise self.fail(name, f"is {column.type}, expected a list")
        return self._whole(name, self._flat(column))

    def ints(self, name: str, values: pa.Array | None = None) -> Ints:
        values = self.items(name) if values is None else values
        # An empty list that nobody gave a type.
        if pa.types.is_null(values.type) and not len(values):
            return np.zeros(0, dtype=np.int64)
        if pa.types.is_dictionary(values.type) and not _is_text(values.type):
            values = values.dictionary.take(values.indices)
        if not _is_integer(values.type):
            raise self.fail(name, f"holds {values.type}, expected int64")
        # A copy, which does not keep the body.
        ids: Ints = values.to_numpy(zero_copy_only=False).astype(np.int64)
        return ids

    def bags(self, name: str, feature: str, part: str) -> Bags:
        values = self.items(name)
        if not is_list(values.type):
            return Bags(self._ids(name, feature, part, values))
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        offsets = np.zeros(lengths.size + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        inner = self._whole(name, self._flat(values))
        return Bags(self._ids(name, feature, part, inner), offsets)

    def one_bag(self, name: str, feature: str) -> Bags:
        column = self._column(name)
        values = self.items(name) if is_list(column.type) else column
        ids = self._ids(name, feature, f"context.{feature}", values)
        return Bags(ids, np.array([0, ids.size]))

    def floats(self, name: str) -> Doubles:
        values = self.items(name)
        if not pa.types.is_floating(values.type):
            raise self.fail(name, f"holds {values.type}, expected float32")
        numbers: Doubles = values.to_numpy(zero_copy_only=False).astype(np.float64)
        return numbers

    def whole(self, name: str) -> int | None:
        """A single number, or None where the column or the value is missing."""
        if name not in self.names:
            return None
        column = self.batch.column(name)
        if not _is_integer(column.type):
            raise self.fail(name, f"is {column.type}, expected int64")
        found: int | None = column[self.row].as_py()
        return found

    def user(self) -> pa.Array | None:
        """One integer or one text, or None where the column or the value is missing."""
        name = "user_id"
        if name not in self.names or not _is_text(self.batch.column(name).type):
            number = self.whole(name)
            return None if number is None else as_user(number)
        if self.translation is None:
            raise self._text(name, self.batch.column(name).type)
        one = self.batch.column(name).slice(self.row, 1)
        if pa.types.is_dictionary(one.type):
            index = one.indices[0].as_py()
            one = pa.nulls(1, pa.large_string()) if index is None else one.dictionary.slice(index, 1)
        return None if one.null_count else one.cast(pa.large_string())

    def after(self, prefix: str, known: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(feature, its column) of the known features that there are columns of."""
        return ((name, f"{prefix}{name}") for name in known if f"{prefix}{name}" in self.names)

    def _column(self, name: str) -> pa.Array:
        column = self.batch.column(name).slice(self.row, 1)
        if column.null_count:
            raise self.fail(name, "is null")
        return column

    def _flat(self, lists: pa.Array) -> pa.Array:
        """The items of lists one after the other, counted before any of them is copied."""
        count = pc.sum(pc.list_value_length(lists)).as_py() or 0
        self.left.take(count + len(lists))
        return lists.flatten()

    def _ids(self, name: str, feature: str, part: str, values: pa.Array) -> Ints:
        if self.translation is not None:
            return self.translation.ids(feature, values, part, f"{self.place}, column {name}")
        if _is_text(values.type):
            raise self._text(name, values.type)
        return self.ints(name, values)

    def _text(self, name: str, kind: pa.DataType) -> RequestError:
        hint = "for raw values say `ids: raw` in the schema's metadata"
        return self.fail(name, f"holds {kind}, expected int64; {hint}")

    def _whole(self, name: str, values: pa.Array) -> pa.Array:
        nulls = values.null_count
        if pa.types.is_dictionary(values.type):
            nulls += values.dictionary.null_count
        if nulls or (pa.types.is_null(values.type) and len(values)):
            raise self.fail(name, "holds a null")
        return values


def _is_read(kind: pa.DataType) -> bool:
    plain = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null, _is_text)
    return any(known(kind) for known in plain)


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def _is_text(kind: pa.DataType) -> bool:
    return is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _request(row: _Row, stored: Mapping[int, History], needs: Needs, limits: Limits) -> Request:
    user, when = row.user(), row.whole("request_timestamp")
    number = number_sent(user)
    if "history_timestamp" in row.names:
        features = row.after("history_", needs.features)
        history = History(
            row.ints("history_timestamp"),
            {name: row.bags(column, name, f"history.{name}") for name, column in features},
            *(row.ints(n) if n in row.names else None for n in ("cluster_size", "cluster_time")),
        )
    else:
        number, history = stored_history(stored, user, names_of(row.translation), row.place)
    candidates = {
        name: row.bags(column, name, f"candidates.{name}")
        for name, column in row.after("candidate_", needs.features)
    }
    request = Request(
        user_id=number,
        history=history,
        time=time_of(when, history),
        candidates=candidates,
        count=max(map(size_of, candidates.values()), default=0),
        context={name: row.one_bag(column, name) for name, column in row.after("context_", needs.context)},
        numeric={name: row.floats(column) for name, column in row.after("numeric_", needs.numeric)},
        unknown={} if row.translation is None else row.translation.unknown,
    )
    return checked(request, needs, limits, row.place)
