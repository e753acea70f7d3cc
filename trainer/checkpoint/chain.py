"""A checkpoint that holds touched rows only, together with those that it builds on, read as one.

`state.json` of a delta names its base under `base`: the folder, the SHA-256 of that folder's manifest, how
many deltas there are since the full checkpoint (`links`), and of which tensors it holds rows (`rows_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.futures import Future

from embeddings.errors import CheckpointError
from trainer.checkpoint import files
from trainer.checkpoint.delta import Link
from trainer.checkpoint.delta_files import ShardRows, open_rows
from trainer.checkpoint.row_blocks import PIECE_BYTES, PieceReader
from trainer.sealed_folder import raise_of_store

_IDS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Base:
    """What a delta says of the checkpoint that it builds on."""

    link: Link
    links: int
    rows_of: tuple[str, ...]


def base_of(path: Path, state: Mapping[str, Any]) -> Base | None:
    """What a checkpoint builds on; None where it is full.

    Raises:
        CheckpointError: its state says it in a way that this version does not know.
    """
    entry = state.get("base")
    if entry is None:
        return None
    try:
        name, digest, links = str(entry["name"]), str(entry["sha256"]), int(entry["links"])
        rows_of = tuple(str(each) for each in entry["rows_of"])
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(path / files.STATE, "does not say what it builds on") from None
    older = files.is_checkpoint(name) and files.step_of(path.parent / name) < files.step_of(path)
    if not older or links < 1:
        raise CheckpointError(path / files.STATE, f"cannot build on {name!r}")
    return Base(Link(name, digest), links, rows_of)


def folders_of(path: Path) -> list[tuple[Path, Base | None]]:
    """A verified checkpoint and all that it builds on, the newest first; the last one is full."""
    found, here = [], path
    while True:
        base = base_of(here, files.read_state(here))
        found.append((here, base))
        if base is None:
            return found
        here = path.parent / base.link.name


class ChainReader(PieceReader):
    """Reads a checkpoint; rows that are not in it come from the one that it builds on.

    Args:
        path: a checkpoint that was verified together with all that it builds on.
    """

    def __init__(self, path: Path, piece_bytes: int = PIECE_BYTES) -> None:
        super().__init__(path, piece_bytes)
        self._path = path
        self._deltas: dict[int, list[ShardRows]] = {}
        # Tensor -> which of the older ones holds it whole.
        self._holder: dict[str, int] = {}

    @cached_property
    def _folders(self) -> list[tuple[Path, Base | None]]:
        return folders_of(self._path)

    @cached_property
    def _older(self) -> list[PieceReader]:
        """Of each older checkpoint of the chain, the newest first."""
        return [PieceReader(folder, self._piece_bytes) for folder, _ in self._folders[1:]]

    def open(self) -> None:
        """Read what the chain holds.

        DCP, which asks for that, takes any error for metadata that are not there, logs its traceback, and
        goes on without the other ranks; so this comes first.
        """
        _ = self._metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        metadata: Metadata = super().read_metadata()
        missing = list(self._folders[0][1].rows_of) if self._folders[0][1] is not None else []
        for place, reader in enumerate(self._older):
            older = reader.read_metadata()
            reader.set_up_storage_reader(older, is_coordinator=True)
            for name in [each for each in missing if each in older.state_dict_metadata]:
                metadata.state_dict_metadata[name] = older.state_dict_metadata[name]
                self._holder[name] = place
                missing.remove(name)
        if missing:
            raise CheckpointError(str(self.path), f"nothing that it builds on holds {missing[0]}")
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        mine: list[ReadItem] = []
        older: dict[int, list[ReadItem]] = {}
        for item in plan.items:
            place = self._holder.get(item.storage_index.fqn)
            (mine if place is None else older.setdefault(place, [])).append(item)
        for place, items in older.items():
            for item in items:
                self._older[place].read_data(LoadPlan([item]), planner)
                self._lay_over(item, place, planner.resolve_tensor(item).detach())
        return super().read_data(LoadPlan(mine), planner)

    def _lay_over(self, item: ReadItem, place: int, target: Tensor) -> None:
        name = item.storage_index.fqn
        begin = item.storage_index.offset or (0,) * len(item.storage_offsets)
        row, column, *_ = (*map(sum, zip(begin, item.storage_offsets, strict=True)), 0)
        # From the one after the holder to the newest.
        for number in range(place, -1, -1):
            for shard in self.delta(number):
                if name in shard.parts:
                    shard.lay_over(name, target, row, column)

    def delta(self, number: int) -> list[ShardRows]:
        """The rows of a checkpoint of the chain; 0: the newest."""
        if number not in self._deltas:
            self._deltas[number] = open_rows(self._folders[number][0])
        return self._deltas[number]

    def touched_since(self, table: str, rows: int, step: int) -> Iterator[Tensor] | None:
        """See `TensorReader.touched_since`."""
        wanted = 0
        for folder, base in self._folders:
            if files.step_of(folder) <= step:
                break
            if base is None or not any(f".{table}." in name for name in base.rows_of):
                return None
            wanted += 1
        if files.step_of(self._folders[wanted][0]) != step:
            # It stands between two of the chain, and what was touched after it is not known alone.
            return None
        shards = [shard for number in range(wanted) for shard in self.delta(number)]
        return _touched(shards, table, rows)


def _touched(shards: Sequence[ShardRows], table: str, rows: int) -> Iterator[Tensor]:
    for start in range(0, rows, _IDS_AT_ONCE):
        stop, found = min(start + _IDS_AT_ONCE, rows), list[Tensor]()
        for shard in (each for each in shards if each.table == table):
            try:
                found += [ids for _, ids in shard.ids_between(start, stop)]
            except OSError as error:
                raise_of_store(shard.file, error)
                raise CheckpointError(shard.file, f"cannot be read: {error.strerror or error}") from None
        if found:
            yield torch.cat(found).unique()
