"""Rows out of the files of a delta, range by range; `trainer.checkpoint.delta` says what they hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embeddings.errors import CheckpointError
from trainer.checkpoint.delta import STRIDE, is_delta
from trainer.checkpoint.tensor_stream import TYPE_NAMES
from trainer.sealed_folder import raise_of_store
from trainer.storage.objects import read_range

_DTYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: where it begins, its type and shape."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ShardRows:
    """The touched rows of one shard in one file.

    Attributes:
        parts: name of a tensor -> (what is added to an id for its row there, its first column, where it is).
    """

    file: Path
    table: str
    parts: dict[str, tuple[int, int, _Stored]]
    ids: _Stored
    first: Tensor
    _newest: dict[int, Tensor] = field(default_factory=dict)

    def ids_between(self, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """The ids in [start, stop) as (place of the first of them, ids), ascending, some at once."""
        # The pieces that can hold some: from the last that begins at or before `start`.
        edges = torch.tensor([start, stop])
        low, high = torch.searchsorted(self.first, edges, right=False).tolist()
        for piece in range(max(0, low - 1), high):
            begin, ids = piece * STRIDE, self._piece(piece)
            left, right = torch.searchsorted(ids, edges).tolist()
            if right > left:
                yield begin + left, ids[left:right]

    def lay_over(self, name: str, target: Tensor, row: int, column: int) -> None:
        """Put the touched rows of a tensor into a part of it.

        Args:
            target: [rows, columns] or [rows] of the tensor, from its row `row` and its column `column` on.
        """
        shift, own_column, stored = self.parts[name]
        start, stop = row - shift, row - shift + target.shape[0]
        ours = theirs = slice(None)
        if target.dim() > 1:
            begin, end = max(column, own_column), min(column + target.shape[1], own_column + stored.shape[1])
            if begin >= end:
                return
            ours = slice(begin - column, end - column)
            theirs = slice(begin - own_column, end - own_column)
        for place, ids in self.ids_between(start, stop):
            rows = self._read(stored, place, place + len(ids))
            here = (ids - start).to(target.device)
            found = rows if target.dim() == 1 else rows[:, theirs]
            part = target if target.dim() == 1 else target[:, ours]
            part[here] = found.to(target.device, target.dtype)

    def _piece(self, number: int) -> Tensor:
        """The ids between two of `first`; the newest stays, for whoever asks for range after range."""
        if number not in self._newest:
            begin = number * STRIDE
            self._newest.clear()
            self._newest[number] = self._read(self.ids, begin, min(begin + STRIDE, self.ids.shape[0]))
        return self._newest[number]

    def _read(self, stored: _Stored, start: int, stop: int) -> Tensor:
        return _read_rows(self.file, stored, start, stop)


def _read_rows(file: Path, stored: _Stored, start: int, stop: int) -> Tensor:
    row = torch.Size(stored.shape[1:]).numel() * stored.dtype.itemsize
    begin, size = stored.begin + start * row, (stop - start) * row
    content = bytearray(read_range(file, begin, begin + size))
    if not content:
        return torch.empty((stop - start, *stored.shape[1:]), dtype=stored.dtype)
    return torch.frombuffer(content, dtype=stored.dtype).view(stop - start, *stored.shape[1:])


def open_rows(folder: Path, named: Callable[[str], bool] = is_delta) -> list[ShardRows]:
    """The shards of all files of a verified delta, or of other files of a checkpoint with rows.

    Args:
        named: whether a file of this name is one of them.

    Raises:
        CheckpointError: a file's header says something else than this version writes.
    """
    found = []
    for file in sorted(file for file in folder.iterdir() if named(file.name)):
        try:
            found += _open(file)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise_of_store(file, error)
            raise CheckpointError(file, f"its header cannot be read: {error}") from None
    return found


def _open(file: Path) -> list[ShardRows]:
    length = int.from_bytes(read_range(file, 0, 8), "little")
    header: dict[str, Any] = json.loads(read_range(file, 8, 8 + length))
    notes = header.pop("__metadata__")
    if notes["format"] != "tandemrec.delta":
        raise ValueError(f"it is {notes['format']}")
    stored = {
        name: _Stored(8 + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], tuple(entry["shape"]))
        for name, entry in header.items()
    }
    shards = []
    for number, shard in enumerate(json.loads(notes["shards"])):
        parts = {
            part["name"]: (part["shift"], part["column"], stored[f"{number}.{place}"])
            for place, part in enumerate(shard["parts"])
        }
        first = stored[f"{number}.first"]
        index = _read_rows(file, first, 0, first.shape[0])
        shards.append(ShardRows(file, shard["table"], parts, stored[f"{number}.ids"], index))
    return shards
