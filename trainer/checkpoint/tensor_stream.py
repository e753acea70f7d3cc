"""Safetensors files that are written row by row, so that no table must fit in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final

import torch
from torch import Tensor

from trainer.sealed_folder import naming

_NAMES: Final = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int64: "I64",
}
_MOST_ROWS = 2**62


class TensorStream:
    """A safetensors file whose tensors are appended to piece by piece; its header is written at the end.

    Args:
        path: the file to write.
        layout: name of a tensor -> type and shape of a row, in the order in which the tensors are written.
        rows: of every tensor; None = not known yet, which works for a single tensor.
        alignment: of the place where the first tensor begins.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        rows: int | None = None,
        alignment: int = 64,
    ) -> None:
        self.rows = 0
        self._path, self._layout, self._known = path, layout, rows
        # Room for as many rows as there can be.
        room = 8 + len(self._header(_MOST_ROWS if rows is None else rows))
        self._begin = -(-room // alignment) * alignment
        self._file = path.open("wb")
        self._file.seek(self._begin)

    def append(self, name: str, rows: Tensor) -> None:
        """Write the next rows of a tensor; those of the tensors before it are complete."""
        if (rows.dtype, tuple(rows.shape[1:])) != self._layout[name]:
            raise ValueError(f"{rows.dtype} {list(rows.shape)} is no piece of {name}")
        with naming(self._path):
            # Bytes, since numpy knows no bfloat16.
            self._file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
        self.rows += rows.shape[0]

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with naming(self._path), self._file as file:
            header = self._header(self.rows if self._known is None else self._known).ljust(self._begin - 8)
            file.seek(0)
            file.write(len(header).to_bytes(8, "little") + header)

    def _header(self, rows: int) -> bytes:
        entries, end = {}, 0
        for name, (dtype, row) in self._layout.items():
            begin, end = end, end + torch.Size((rows, *row)).numel() * dtype.itemsize
            entries[name] = {"dtype": _NAMES[dtype], "shape": (rows, *row), "data_offsets": [begin, end]}
        return json.dumps(entries).encode()
