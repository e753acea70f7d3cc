"""Safetensors files that are written row by row, so that no table must fit in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from trainer.sealed_folder import entry_of, naming

# As the header of a safetensors file spells them.
TYPE_NAMES: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.int64: "I64",
}
_MOST_ROWS = 2**62


class TensorStream:
    """A safetensors file whose tensors are appended to piece by piece.

    Args:
        path: the file to write.
        layout: name of a tensor -> type and shape of a row, in the order in which the tensors are written.
        rows: of every tensor, or of each by its name; None = not known yet, which works for a single tensor:
            then the header is written at the end, and the file read once more for its digest.
        alignment: of the place where the first tensor begins.
        notes: what the header says besides.

    Attributes:
        entry: size and digest of the file as manifests list them, once it is closed.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        rows: int | Mapping[str, int] | None = None,
        alignment: int = 64,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.rows, self._notes = 0, dict(notes or {})
        self._path, self._layout, self._known = path, layout, rows
        # Room for as many rows as there can be.
        room = 8 + len(self._header(_MOST_ROWS if rows is None else rows))
        self._begin = -(-room // alignment) * alignment
        self._file, self._digest, self._size = path.open("wb"), hashlib.sha256(), 0
        self.entry: dict[str, Any] = {}
        if rows is None:
            self._file.seek(self._begin)
        else:
            self._write(self._padded_header(rows))

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor; those of the tensors before it are complete."""
        if (rows.dtype, tuple(rows.shape[1:])) != self._layout[name]:
            raise ValueError(f"{rows.dtype} {list(rows.shape)} is no piece of {name}")
        # Bytes, since numpy knows no bfloat16.
        self._write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
        self.rows += rows.shape[0]

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self._path), self._file as file:
            if self._known is None:
                file.seek(0)
                file.write(self._padded_header(self.rows))
        if kind is not None:
            return
        if self._known is None:
            self.entry = entry_of(self._path)
        else:
            self.entry = {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def _write(self, content: bytes | memoryview) -> None:
        with naming(self._path):
            self._file.write(content)
        if self._known is not None:
            self._digest.update(content)
            self._size += len(content)

    def _padded_header(self, rows: int | Mapping[str, int]) -> bytes:
        header = self._header(rows).ljust(self._begin - 8)
        return len(header).to_bytes(8, "little") + header

    def _header(self, rows: int | Mapping[str, int]) -> bytes:
        entries: dict[str, Any] = {"__metadata__": self._notes} if self._notes else {}
        end = 0
        for name, (dtype, row) in self._layout.items():
            shape = (rows if isinstance(rows, int) else rows[name], *row)
            begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
            entries[name] = {"dtype": TYPE_NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}
        return json.dumps(entries).encode()
