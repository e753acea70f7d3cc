"""Tensors of the open inference protocol: from bytes, from typed lists and from JSON, and back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from trainer.serving.request import RequestError

# Data type -> of numpy, of Arrow, and the field of typed contents that holds it.
_KINDS: dict[str, tuple[Any, pa.DataType, str]] = {
    "BOOL": (np.bool_, pa.bool_(), "bool_contents"),
    "INT8": (np.int8, pa.int8(), "int_contents"),
    "INT16": (np.int16, pa.int16(), "int_contents"),
    "INT32": (np.int32, pa.int32(), "int_contents"),
    "INT64": (np.int64, pa.int64(), "int64_contents"),
    "UINT8": (np.uint8, pa.uint8(), "uint_contents"),
    "UINT16": (np.uint16, pa.uint16(), "uint_contents"),
    "UINT32": (np.uint32, pa.uint32(), "uint_contents"),
    "UINT64": (np.uint64, pa.uint64(), "uint64_contents"),
    "FP16": (np.float16, pa.float16(), ""),
    "FP32": (np.float32, pa.float32(), "fp32_contents"),
    "FP64": (np.float64, pa.float64(), "fp64_contents"),
    "BYTES": (None, pa.large_binary(), "bytes_contents"),
}
_NAMES = {np.dtype(kind): name for name, (kind, _, _) in _KINDS.items() if kind is not None}


# As many as an Arrow schema may have columns.
_MOST_TENSORS = 10_000


def check_tensors(names: Sequence[str]) -> None:
    """Raises RequestError: 413 for more tensors than a call may have, 422 where one is there twice."""
    if len(names) > _MOST_TENSORS:
        raise RequestError(413, f"{len(names):,} tensors; a call may have {_MOST_TENSORS:,}")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise RequestError(422, f"tensor {twice[:80]} is there twice")


@dataclass(frozen=True)
class Shaped:
    """What a client says of a tensor, before its values are read."""

    name: str
    datatype: str
    shape: Sequence[int]

    @property
    def count(self) -> int:
        """How many values it has.

        Raises:
            RequestError: 422 where the shape is not that of one request.
        """
        shape = list(self.shape)
        if len(shape) > 2 or min(shape, default=0) < 0 or (len(shape) == 2 and shape[0] != 1):
            problem = f"shape {shape[:8]}; a call is one request, expected [n] or [1, n]"
            raise RequestError(422, f"tensor {self.name[:80]}: {problem}")
        return math.prod(shape)

    def kind(self) -> tuple[Any, pa.DataType, str]:
        """Raises RequestError (422) for a data type that is not read."""
        if self.datatype not in _KINDS:
            problem = f"data type {self.datatype[:20]!r} is not read; known are {', '.join(_KINDS)}"
            raise RequestError(422, f"tensor {self.name[:80]}: {problem}")
        return _KINDS[self.datatype]

    def of_bytes(self, raw: bytes) -> pa.Array:
        """Values from little-endian bytes; texts have their length in four bytes before each."""
        kind, arrow, _ = self.kind()
        if kind is None:
            return pa.array(self._texts(raw), arrow)
        size = np.dtype(kind).itemsize
        if len(raw) != size * self.count:
            problem = f"{len(raw):,} bytes, expected {size * self.count:,} of {self.datatype}"
            raise RequestError(422, f"tensor {self.name[:80]}: {problem}")
        return pa.array(np.frombuffer(raw, kind), arrow)

    def of_values(self, values: Sequence[Any]) -> pa.Array:
        """Values from a list, of typed contents or of JSON."""
        _, arrow, _ = self.kind()
        if len(values) != self.count:
            problem = f"{len(values):,} values, expected {self.count:,}"
            raise RequestError(422, f"tensor {self.name[:80]}: {problem}")
        try:
            return pa.array(values, arrow)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            problem = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            raise RequestError(422, f"tensor {self.name[:80]}: {problem}") from None

    def _texts(self, raw: bytes) -> list[bytes]:
        texts, at, view = list[bytes](), 0, memoryview(raw)
        for _ in range(self.count):
            size = int.from_bytes(view[at : at + 4], "little")
            if at + 4 + size > len(raw):
                break
            texts.append(bytes(view[at + 4 : at + 4 + size]))
            at += 4 + size
        if len(texts) != self.count or at != len(raw):
            problem = f"{len(raw):,} bytes are not {self.count:,} texts, each behind its length in 4 bytes"
            raise RequestError(422, f"tensor {self.name[:80]}: {problem}")
        return texts


def typed_field(datatype: str) -> str:
    """The field of typed contents that holds a data type; empty where none does."""
    return _KINDS.get(datatype, (None, None, ""))[2]


def flat(data: Any) -> list[Any]:
    """The values of a list, or of a list of one list, as JSON spells a tensor."""
    if isinstance(data, list) and data and isinstance(data[0], list):
        return list(chain.from_iterable(part if isinstance(part, list) else [part] for part in data))
    return data if isinstance(data, list) else [data]


@dataclass(frozen=True)
class Output:
    """A tensor of an answer: an array of one dimension, or one body of bytes."""

    name: str
    values: npt.NDArray[Any] | bytes

    @property
    def datatype(self) -> str:
        return "BYTES" if isinstance(self.values, bytes) else _NAMES[self.values.dtype]

    @property
    def shape(self) -> list[int]:
        return [1] if isinstance(self.values, bytes) else [int(self.values.size)]

    def raw(self) -> bytes:
        """As the protocol's raw bytes."""
        if isinstance(self.values, bytes):
            return len(self.values).to_bytes(4, "little") + self.values
        # The protocol is little-endian, as all that this runs on.
        return np.ascontiguousarray(self.values).tobytes()

    def listed(self) -> list[Any]:
        """As JSON has it."""
        if isinstance(self.values, bytes):
            return [self.values.decode()]
        listed: list[Any] = self.values.tolist()
        return listed
