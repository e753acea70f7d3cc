"""Safetensors files of a snapshot: written row by row, read memory-mapped and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from embeddings.errors import SnapshotError

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.uint8: "U8", torch.int64: "I64"}
_ALIGNMENT = 64
# Far more than any file here needs; a header of 100 MB would take seconds and gigabytes to parse.
_LARGEST_HEADER = 1 << 20


class RowStream:
    """One tensor [rows, columns] (or [rows]) appended to piece by piece; its header is filled in at the end.

    Args:
        path: the file to write; name: of the tensor; dtype, columns: of a row, no columns for a vector.
    """

    def __init__(self, path: Path, name: str, dtype: torch.dtype, columns: int | None = None) -> None:
        self.rows = 0
        self._name, self._dtype, self._columns = name, dtype, columns
        # Room for as many rows as there can be.
        room = 8 + len(self._header(2**62))
        self._begin = -(-room // _ALIGNMENT) * _ALIGNMENT
        self._file = path.open("wb")
        self._file.seek(self._begin)

    def append(self, rows: Tensor) -> None:
        if rows.dtype != self._dtype or rows.shape[1:] != self._shape(0)[1:]:
            raise ValueError(f"{rows.dtype} {list(rows.shape)} is no piece of {self._name}")
        self._file.write(rows.contiguous().numpy().data)
        self.rows += rows.shape[0]

    def __enter__(self) -> RowStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file as file:
            header = self._header(self.rows).ljust(self._begin - 8)
            file.seek(0)
            file.write(len(header).to_bytes(8, "little") + header)

    def _shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self._columns is None else (rows, self._columns)

    def _header(self, rows: int) -> bytes:
        shape = self._shape(rows)
        size = torch.Size(shape).numel() * self._dtype.itemsize
        entry = {"dtype": _NAMES[self._dtype], "shape": shape, "data_offsets": [0, size]}
        return json.dumps({self._name: entry}).encode()


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a file, memory-mapped copy-on-write.

    Raises:
        SnapshotError: it is no safetensors file, or has an absurd header.
    """
    file = path / name
    try:
        with file.open("rb") as raw:
            if int.from_bytes(raw.read(8), "little") > _LARGEST_HEADER:
                raise SnapshotError(file, f"its header is larger than {_LARGEST_HEADER:,} bytes")
        tensors: dict[str, Tensor] = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SnapshotError(file, f"unreadable: {error}") from None
    return tensors


def read_one(path: Path, file: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The one tensor of a file.

    Raises:
        SnapshotError: it holds anything but that tensor.
    """
    tensors = read_tensors(path, file)
    if list(tensors) != [name]:
        raise SnapshotError(path / file, f"should hold the one tensor {name!r}")
    found = tensors[name]
    if found.dtype != dtype or tuple(found.shape) != shape:
        kinds = f"{found.dtype} {list(found.shape)}, expected {dtype} {list(shape)}"
        raise SnapshotError(path / file, f"holds {kinds}")
    return found


def expect_like(path: Path, file: str, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Tensors must have the names, types and shapes of others, and be finite.

    Raises:
        SnapshotError: naming the first that has not.
    """
    missing, surplus = sorted(like.keys() - tensors.keys()), sorted(tensors.keys() - like.keys())
    for names, what in ((missing, "missing"), (surplus, "superfluous")):
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise SnapshotError(path / file, f"does not fit the config: {names[0]}{others} {what}")
    for name, wanted in like.items():
        found = tensors[name]
        if found.dtype != wanted.dtype or found.shape != wanted.shape:
            kinds = f"{found.dtype} {list(found.shape)}, expected {wanted.dtype} {list(wanted.shape)}"
            raise SnapshotError(path / file, f"does not fit the config: {name} is {kinds}")
        if found.is_floating_point() and not found.isfinite().all():
            raise SnapshotError(path / file, f"{name} holds numbers that are not finite")
