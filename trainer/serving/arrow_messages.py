"""What the messages of an Arrow IPC stream claim, read before Arrow believes it.

A message is a flatbuffer and a body. Within a flatbuffer anything may be referred to many times, so that a
few kilobytes can describe millions of columns or repeat one long name; and a compressed body of a few bytes
may claim to become gigabytes. Arrow would allocate all of it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pyarrow as pa

from trainer.serving.request import RequestError

_SCHEMA, _DICTIONARY, _RECORDS = 1, 2, 3
_TIMESTAMP = 10
_MOST_MESSAGES = 1_000
_MOST_COLUMNS, _DEEPEST = 10_000, 64
_MOST_TEXT = 4 << 20


def check_messages(body: bytes | memoryview) -> None:
    """Refuse a stream that would take far more memory than it is long.

    Raises:
        RequestError: 413 for more messages, columns or texts than are taken, 422 for compressed bodies.
        ValueError, OSError, struct.error, IndexError, pa.ArrowException: it is no such stream.
    """
    # `text` counts the bytes of names and metadata so far.
    source, messages, text = pa.BufferReader(body), 0, 0
    while source.tell() < len(body):
        try:
            message = pa.ipc.read_message(source)
        except EOFError:
            return
        messages += 1
        if messages > _MOST_MESSAGES:
            raise RequestError(413, f"more than {_MOST_MESSAGES:,} Arrow messages in a body")
        data = memoryview(message.metadata)
        table = _Table(data, _u32(data, 0))
        kind, header = table.byte(1), table.table(2)
        text = _text_of_pairs(table, 4, text)
        if header is None or (kind == _SCHEMA) != (messages == 1):
            raise RequestError(422, "no Arrow IPC stream: it is one schema, and batches behind it")
        if kind == _SCHEMA:
            text = _check_schema(header, text)
            continue
        if kind == _DICTIONARY and header.byte(2):
            raise RequestError(422, "dictionaries in pieces (deltas) are not read; write each whole")
        records = header.table(1) if kind == _DICTIONARY else header
        if records is not None and records.place(3):
            raise RequestError(422, "compressed Arrow bodies are not accepted; write it uncompressed")


class _Table:
    """A table of a flatbuffer: its fields lie where its vtable says."""

    def __init__(self, data: memoryview, at: int) -> None:
        self.data, self.at = data, at
        self._vtable = at - struct.unpack_from("<i", data, at)[0]
        if not 0 <= at < len(data) or self._vtable < 0:
            raise IndexError("a table outside of its message")
        self._size = struct.unpack_from("<H", data, self._vtable)[0]

    def place(self, field: int) -> int:
        """Where a field lies; 0 where it is missing."""
        slot = 4 + 2 * field
        if slot + 2 > self._size:
            return 0
        offset: int = struct.unpack_from("<H", self.data, self._vtable + slot)[0]
        return self.at + offset if offset else 0

    def byte(self, field: int) -> int:
        at = self.place(field)
        return self.data[at] if at else 0

    def table(self, field: int) -> _Table | None:
        at = self.place(field)
        return _Table(self.data, at + _u32(self.data, at)) if at else None

    def length(self, field: int) -> int:
        """The length of a text or vector."""
        at = self.place(field)
        return _u32(self.data, at + _u32(self.data, at)) if at else 0

    def tables(self, field: int) -> Iterator[_Table]:
        """The tables of a vector."""
        at = self.place(field)
        if at:
            vector = at + _u32(self.data, at)
            for place in range(vector + 4, vector + 4 + 4 * self.length(field), 4):
                yield _Table(self.data, place + _u32(self.data, place))


def _u32(data: memoryview, at: int) -> int:
    value: int = struct.unpack_from("<I", data, at)[0]
    return value


def _check_schema(schema: _Table, text: int) -> int:
    text = _text_of_pairs(schema, 2, text)
    columns, left = 0, [schema.tables(1)]
    while left:
        field = next(left[-1], None)
        if field is None:
            left.pop()
            continue
        columns += 1
        kind = field.table(3)
        time_zone = kind.length(1) if kind is not None and field.byte(2) == _TIMESTAMP else 0
        text = _text_of_pairs(field, 6, text + field.length(0) + time_zone)
        if columns > _MOST_COLUMNS or len(left) > _DEEPEST:
            raise RequestError(413, f"more than {_MOST_COLUMNS:,} columns")
        left.append(field.tables(5))
    return text


def _text_of_pairs(table: _Table, field: int, text: int) -> int:
    """Adds the bytes of keys and values of custom metadata."""
    for pair in table.tables(field):
        text += pair.length(0) + pair.length(1) + 16
        if text > _MOST_TEXT:
            break
    if text > _MOST_TEXT:
        raise RequestError(413, f"more than {_MOST_TEXT:,} bytes of names and metadata")
    return text
