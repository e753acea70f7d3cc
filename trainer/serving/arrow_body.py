"""Requests and answers as Arrow IPC streams: no parsing of numbers, which is most of the cost of JSON.

One row a request. The columns are those of the sequence log: `user_id`, `request_timestamp`,
`history_timestamp`, `history_<feature>`, `candidate_<feature>`, `context_<feature>`, `numeric_<name>`,
`cluster_size`, `cluster_time`; a list of lists where a behavior or candidate has several ids. Lists may be of
any of Arrow's kinds, and ids dictionaries. Raw values instead of ids are announced by `ids: raw` in the
metadata of the schema, as is what is asked of how sure the model is (`trainer.serving.exploration`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from trainer.log.arrow import PARQUET_ERRORS, is_list, is_text
from trainer.log.bags import Bags, Ints
from trainer.log.encoders.encoder import Encoder
from trainer.log.known_values import KnownValues
from trainer.log.schema import CLUSTER_COLUMNS
from trainer.serving.arrow_messages import check_messages
from trainer.serving.checks import check_names
from trainer.serving.exploration import Exploration, exploration_of
from trainer.serving.form import RequestForm
from trainer.serving.histories import as_user
from trainer.serving.known_names import check_columns, check_keys
from trainer.serving.numbers import codes_of_array
from trainer.serving.request import Doubles, History, Limits, Needs, Part, Request, RequestError
from trainer.serving.scorer import Answer
from trainer.serving.vocabulary import Translation, check_text

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
# Places of a request in JSON whose columns have other names.
_COLUMNS = {
    "time": "request_timestamp",
    "history.timestamp": "history_timestamp",
    "history": "history_*",
    "candidates": "candidate_*",
}


def read_arrow(
    body: bytes | memoryview,
    stored: Mapping[int, History],
    needs: Needs,
    limits: Limits,
    vocabularies: Mapping[str, KnownValues] | None = None,
    users: KnownValues | None = None,
) -> tuple[list[Request], Exploration | None]:
    """Requests of an Arrow IPC stream, checked, and what it asks of how sure the model is.

    Args:
        stored: histories by user id; users: their names, where the log has names.
        vocabularies: of the features whose raw values may be sent.

    Raises:
        RequestError: 413 above a limit, 404 for an unknown user, 422 for anything else.
    """
    requests: list[Request] = []
    values_left = ValuesLeft(limits.ids)
    try:
        check_messages(body)
        with pa.ipc.open_stream(body) as reader:
            schema = reader.schema
            if len(set(schema.names)) != len(schema.names):
                raise RequestError(422, "a column occurs twice")
            metadata = schema.metadata or {}
            check_keys((key.decode(errors="replace") for key in metadata), "the schema's metadata")
            exploration, ids = exploration_of(metadata), metadata.get(b"ids", b"dense")
            if ids not in (b"dense", b"raw"):
                said = ids[:40].decode(errors="replace")
                problem = f"the schema's metadata says ids: {said!r}; dense and raw are known"
                raise RequestError(422, problem)
            for batch in reader:
                if len(requests) + batch.num_rows > limits.requests:
                    raise RequestError(413, f"more than {limits.requests} requests (limits.requests)")
                columns = checked_columns(batch, needs)
                for row in range(columns.num_rows):
                    translation = Translation(vocabularies or {}, users) if ids == b"raw" else None
                    form = ArrowForm(columns, row, len(requests), values_left, needs, translation)
                    requests.append(form.request(stored, limits))
    except (*PARQUET_ERRORS, struct.error, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise RequestError(422, f"no Arrow IPC stream: {reason}") from None
    if not requests:
        raise RequestError(422, "there is no request: the stream has no rows")
    return requests, exploration


def write_arrow(answers: Sequence[Answer], tasks: Sequence[str], version: str) -> bytes:
    """One row a request; the version is in the schema's metadata.

    `score_<task>` is a list of float32, `history_used` how many behaviors the model could see, and
    `unknown` how many raw values stand for no id; `mean_<task>` and the like are there where they were asked
    for.
    """
    columns = {
        f"score_{task}": pa.array([answer.probabilities[:, t] for answer in answers], pa.list_(pa.float32()))
        for t, task in enumerate(tasks)
    }
    for place, task in enumerate(tasks):
        named = [answer.sureness.by_name() for answer in answers if answer.sureness is not None]
        for name in named[0] if named else ():
            values = [each[name][:, place] for each in named]
            columns[f"{name}_{task}"] = pa.array(values, pa.list_(pa.float32()))
    columns["history_used"] = pa.array([answer.history_used for answer in answers], pa.int64())
    columns["unknown"] = pa.array([sum(answer.unknown.values()) for answer in answers], pa.int64())
    table = pa.table(columns).replace_schema_metadata({"version": version})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def checked_columns(batch: pa.RecordBatch, needs: Needs, what: str = "column") -> pa.RecordBatch:
    """The columns that are read, each checked to be what it says.

    Args:
        what: they are called in messages.

    Raises:
        RequestError: 422 naming the column.
    """
    columns = batch.schema.names
    for part in needs.parts:
        if part is needs.history and "history_timestamp" not in columns:
            continue
        given = [name.removeprefix(part.prefix) for name in columns if name.startswith(part.prefix)]
        check_names([name for name in given if name != "timestamp"], part, f"columns {part.prefix}*")
    features = [f"{part.prefix}{name}" for part in needs.parts for name in part.known]
    check_columns(columns, features, what)
    known = ["user_id", "request_timestamp", "history_timestamp", *CLUSTER_COLUMNS, *features]
    there = set(columns)
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
        read = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null, _is_text)
        if not any(known_type(values.type) for known_type in read):
            raise RequestError(422, f"column {name}: holds {values.type}")
        check_text(values, f"column {name}")
        batch.column(name).validate(full=True)
    return batch


class ValuesLeft:
    """Counts down how many values a body may still hold. Where rows share some, each row's count."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise RequestError(413, f"more values than the server takes, {self.most:,} (limits.ids)")


class ArrowForm(RequestForm):
    """One row of a batch; every value is checked for its type and for nulls when it is taken."""

    def __init__(
        self,
        batch: pa.RecordBatch,
        row: int,
        number: int,
        values_left: ValuesLeft,
        needs: Needs,
        translation: Translation | None,
    ) -> None:
        super().__init__(needs, translation, f"requests[{number}]")
        self._batch, self._row, self._left = batch, row, values_left
        self._names = set(batch.schema.names)

    def where(self, column: str) -> str:
        """A column of this row, for messages."""
        return f"{self.place}, column {column}"

    def at(self, path: str) -> str:
        """The column; of a part with several columns, the name that all of them begin with."""
        for part in self.needs.parts:
            if path.startswith(f"{part.path}."):
                return self.where(part.prefix + path.removeprefix(f"{part.path}."))
        return self.where(_COLUMNS.get(path, path.rpartition(".")[2]))

    def time(self) -> int | None:
        return self._integer("request_timestamp")

    def per_behavior(self, name: str) -> Ints | None:
        column = "history_timestamp" if name == "timestamp" else name
        return self._ints(column, self._items(column)) if column in self._names else None

    def has(self, part: Part, name: str) -> bool:
        return f"{part.prefix}{name}" in self._names

    def bags(self, part: Part, name: str) -> Bags:
        column = f"{part.prefix}{name}"
        if part is self.needs.context:
            one = self._cell(column)
            ids = self._ids(part, name, self._items(column) if is_list(one.type) else one)
            return Bags.of_lengths(ids, [ids.size])
        values = self._items(column)
        if not is_list(values.type):
            return Bags(self._ids(part, name, values))
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        inner = self._without_nulls(column, self._flat(values))
        return Bags.of_lengths(self._ids(part, name, inner), lengths)

    def codes(self, part: Part, name: str, encoder: Encoder) -> Ints:
        column = f"{part.prefix}{name}"
        place = self.where(column)
        one = self._batch.column(column).slice(self._row, 1)
        if part is self.needs.context and not is_list(one.type):
            return codes_of_array(one, encoder, place)
        return codes_of_array(self._flat(self._listed(column)), encoder, place)

    def numbers(self, name: str) -> Doubles:
        column = f"{self.needs.numeric.prefix}{name}"
        values = self._items(column)
        if not pa.types.is_floating(values.type):
            raise self._error(column, f"holds {values.type}, expected float32")
        numbers: Doubles = values.to_numpy(zero_copy_only=False).astype(np.float64)
        return numbers

    def user(self) -> pa.Array | None:
        name = "user_id"
        if name not in self._names or not _is_text(self._batch.column(name).type):
            number = self._integer(name)
            return None if number is None else as_user(number)
        if self.translation is None:
            raise self._text(name, self._batch.column(name).type)
        one = self._batch.column(name).slice(self._row, 1)
        if pa.types.is_dictionary(one.type):
            index = one.indices[0].as_py()
            one = pa.nulls(1, pa.large_string()) if index is None else one.dictionary.slice(index, 1)
        return None if one.null_count else one.cast(pa.large_string())

    def _integer(self, name: str) -> int | None:
        """A single number, or None where the column or the value is missing."""
        if name not in self._names:
            return None
        column = self._batch.column(name)
        if not _is_integer(column.type):
            raise self._error(name, f"is {column.type}, expected int64")
        value: int | None = column[self._row].as_py()
        return value

    def _cell(self, name: str) -> pa.Array:
        """This row's value of a column, as an array of one."""
        one = self._batch.column(name).slice(self._row, 1)
        if one.null_count:
            raise self._error(name, "is null")
        return one

    def _items(self, name: str) -> pa.Array:
        """Items of a list, without nulls."""
        return self._without_nulls(name, self._flat(self._listed(name)))

    def _listed(self, name: str) -> pa.Array:
        """This row's list, as an array of one."""
        one = self._cell(name)
        if not is_list(one.type):
            raise self._error(name, f"is {one.type}, expected a list")
        return one

    def _flat(self, lists: pa.Array) -> pa.Array:
        """The items of lists one after the other, counted before any of them is copied."""
        count = pc.sum(pc.list_value_length(lists)).as_py() or 0
        self._left.take(count + len(lists))
        return lists.flatten()

    def _ids(self, part: Part, feature: str, values: pa.Array) -> Ints:
        column = f"{part.prefix}{feature}"
        place = self.where(column)
        if (own := self.own_ids(feature, values, place)) is not None:
            return own
        if self.translation is not None:
            return self.translation.ids(feature, values, f"{part.name}.{feature}", place)
        if _is_text(values.type):
            raise self._text(column, values.type)
        return self._ints(column, values)

    def _ints(self, name: str, values: pa.Array) -> Ints:
        # An empty list that nobody gave a type.
        if pa.types.is_null(values.type) and not len(values):
            return np.zeros(0, dtype=np.int64)
        if pa.types.is_dictionary(values.type) and not _is_text(values.type):
            values = values.dictionary.take(values.indices)
        if not _is_integer(values.type):
            raise self._error(name, f"holds {values.type}, expected int64")
        # A copy, which does not keep the body.
        ids: Ints = values.to_numpy(zero_copy_only=False).astype(np.int64)
        return ids

    def _without_nulls(self, name: str, values: pa.Array) -> pa.Array:
        nulls = values.null_count
        if pa.types.is_dictionary(values.type):
            nulls += values.dictionary.null_count
        if nulls or (pa.types.is_null(values.type) and len(values)):
            raise self._error(name, "holds a null")
        return values

    def _text(self, name: str, kind: pa.DataType) -> RequestError:
        hint = "for raw values say `ids: raw` in the schema's metadata"
        return self._error(name, f"holds {kind}, expected int64; {hint}")

    def _error(self, name: str, problem: str) -> RequestError:
        return RequestError(422, f"{self.where(name)}: {problem}")


def _is_integer(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) and not pa.types.is_uint64(kind))


def _is_text(kind: pa.DataType) -> bool:
    return is_text(kind.value_type if pa.types.is_dictionary(kind) else kind)
