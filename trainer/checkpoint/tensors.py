"""Single tensors of a checkpoint, read piece by piece in one process, without a model or a process group.

Reading a whole checkpoint takes the memory of the whole model; going through it band by band takes that of a
block of rows, however large a table or its shards are.

Lanes of a table (`embeddings.groups.EmbeddingSet.losses`) are no weights of their own here: a row is the sum
of those of the main table and of all lanes, rounded once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from embeddings.errors import CheckpointError
from embeddings.groups import TableName
from embeddings.lookup.sharding import table_of
from trainer.checkpoint.chain import ChainReader
from trainer.checkpoint.row_blocks import BLOCK_BYTES
from trainer.sealed_folder import raise_of_store

_MODEL = "model."


class TensorReader:
    """The tensors of a checkpoint: the model's under the names of its state dict, others as they are saved.

    Args:
        path: a checkpoint that `trainer.checkpoint.save_load` has verified, with all that it builds on where
            it holds touched rows only; its metadata is unpickled.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = ChainReader(path)
        try:
            metadata = self._reader.read_metadata()
        except (OSError, ValueError, RuntimeError) as error:
            raise_of_store(path, error)
            raise CheckpointError(path, f"unreadable: {error}") from None
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._lanes: dict[str, list[str]] = {}
        for name in [name for name in self._tensors if name.startswith(_MODEL)]:
            table = TableName.of(table_of(name))
            if table is not None and table.lane:
                main = name.replace(f".{table}.", f".{table.main}.")
                self._lanes.setdefault(main, []).append(name)

    def names(self) -> list[str]:
        """The names of the model's tensors."""
        lanes = {name for names in self._lanes.values() for name in names}
        found = [name for name in self._tensors if name.startswith(_MODEL) and name not in lanes]
        return [name.removeprefix(_MODEL) for name in found]

    def saved_names(self) -> list[str]:
        """The names of all tensors as they were saved, those of optimizers and lanes among them."""
        return [*self._tensors]

    def lanes(self, name: str) -> list[str]:
        """The names of the weights of a table's lanes, which `names` leaves out."""
        return [lane.removeprefix(_MODEL) for lane in self._lanes.get(self._saved_name(name), ())]

    def __contains__(self, name: str) -> bool:
        return self._saved_name(name) in self._tensors

    def table(self, group: str, table: str) -> str:
        """The name of a table's tensor, whatever kind of collection holds it.

        Raises:
            CheckpointError: there is none.
        """
        start, end = f"collections.{group}.", f".{table}.weight"
        for name in self.names():
            if name.startswith(start) and name.endswith(end):
                return name
        raise CheckpointError(self._path, f"holds no table {table} of group {group}")

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        dtype: torch.dtype = self._entry(name).properties.dtype
        return dtype

    def whole(self, name: str) -> Tensor:
        """One tensor in one piece."""
        size = self._entry(name).size
        return self._read(name, ChunkStorageMetadata(torch.Size([0] * len(size)), size))

    def bands(self, name: str, most: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """A table, or what belongs to its rows, from first row to last, as (first row, rows [n, ...]).

        Args:
            most: bytes of a band, unless one row has more.
        """
        entry = self._entry(name)
        rows, *row = entry.size
        at_once = max(1, most // max(1, torch.Size(row).numel() * entry.properties.dtype.itemsize))
        # Where chunks begin: so a band is of few chunks, of one where none holds some columns only. Ranks
        # that were left without rows have shards, too, at the table's end.
        starts = sorted({chunk.offsets[0] for chunk in entry.chunks if chunk.sizes[0]})
        for start, stop in zip(starts, [*starts[1:], rows], strict=True):
            for first in range(start, stop, at_once):
                yield first, self.rows(name, first, min(first + at_once, stop))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows [start, stop) of a tensor."""
        _, *row = self._entry(name).size
        begin, size = torch.Size([start, *(0 for _ in row)]), torch.Size([stop - start, *row])
        return self._read(name, ChunkStorageMetadata(begin, size))

    def touched_since(self, name: str, step: int) -> Iterator[Tensor] | None:
        """The rows of a table that may have changed since an earlier checkpoint, where the chain knows them.

        Args:
            name: of the table's weights; step: of the earlier checkpoint.

        Returns:
            Ascending row ids, int64, some at once, each once. Rows that came back to what they were may be
            among them. None: the chain does not reach back to a checkpoint of that step.
        """
        return self._reader.touched_since(table_of(name), self._entry(name).size[0], step)

    def _saved_name(self, name: str) -> str:
        return name if name in self._tensors else f"{_MODEL}{name}"

    def _entry(self, name: str) -> TensorStorageMetadata:
        return self._tensors[self._saved_name(name)]

    def _read(self, name: str, part: ChunkStorageMetadata) -> Tensor:
        """A part of a tensor, with what lanes add to it."""
        found = self._read_alone(name, part)
        lanes = self._lanes.get(self._saved_name(name))
        if not lanes:
            return found
        total = found.float()
        for lane in lanes:
            total += self._read_alone(lane, part)
        return total.to(found.dtype)

    def _read_alone(self, name: str, part: ChunkStorageMetadata) -> Tensor:
        entry = self._entry(name)
        target = torch.empty(part.sizes, dtype=entry.properties.dtype)
        items = create_read_items_for_chunk_list(self._saved_name(name), entry, [part])
        try:
            self._reader.read_data(LoadPlan(items), _OneTensor(target)).wait()
        except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
            raise_of_store(self._path, error)
            raise CheckpointError(self._path, f"cannot read {name}: {error}") from None
        if sum(int(torch.Size(item.lengths).numel()) for item in items) != target.numel():
            raise CheckpointError(self._path, f"does not hold the whole of {name}")
        return target


class _OneTensor(DefaultLoadPlanner):
    """Puts whatever is read into one tensor; plans are given, not made here."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise ValueError(f"{read_item.storage_index.fqn} is no tensor")
