"""A delta: the rows that were touched since another checkpoint, as files of safetensors, one a rank.

delta-00000.safetensors     of rank 0; a rank without touched rows writes none
  <n>.ids    int64 [t], ascending: which rows of its table shard n holds
  <n>.first  int64 [ceil(t / 65,536)]: every 65,536th of them, by which a range of rows is found
  <n>.<k>    [t, ...]: the rows of tensor k of the shard, weights first, then each optimizer state
whose header says under `shards` of each shard, as JSON, its table and of each tensor the name, the column
that it begins at, and `shift`: what is added to an id for the row of that tensor. (The states of column
shards lie one below the other.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import LocalShard, local_shards
from embeddings.lookup.touched import ShardKey
from embeddings.private import ShardedTensor
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.sealed_folder import sync

# Between two ids of `first`.
STRIDE = 1 << 16
# Bytes of marks that are looked at together, each of 8 rows.
_BYTES_AT_ONCE = 1 << 17
# Of each byte, how many of its bits are set.
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
_STATES = "optim.state.fused."


class Link(NamedTuple):
    """The checkpoint that a delta builds on: its folder's name, and the SHA-256 of its manifest."""

    name: str
    sha256: str


@dataclass
class TouchedShard:
    """The touched rows of a shard of a table, with whatever belongs to its rows.

    Attributes:
        bits: which they are, see `embeddings.lookup.touched`.
        row: of the whole table, where the shard begins.
        parts: name of a tensor in the checkpoint -> this shard's part of it, all with the shard's rows.
        held: copies of the parts' touched rows; empty: they are taken from the parts.
    """

    table: str
    row: int
    bits: Tensor
    parts: dict[str, LocalShard]
    held: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bits = self.bits.cpu()
        marks = self.bits.numpy()
        pieces = range(0, len(marks), _BYTES_AT_ONCE)
        self.count = sum(int(_ONES[marks[begin : begin + _BYTES_AT_ONCE]].sum()) for begin in pieces)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all parts."""
        return sum(part.tensor[:1].nbytes for part in self.parts.values())

    def hold(self) -> None:
        """Copy the touched rows, so that the parts may change."""
        for name, part in self.parts.items():
            memory = torch.empty((self.count, *part.tensor.shape[1:]), dtype=part.tensor.dtype)
            begin = 0
            for rows in self._rows_of(part.tensor):
                memory[begin : begin + len(rows)] = rows
                begin += len(rows)
            self.held[name] = memory

    def ids(self) -> Iterator[Tensor]:
        """The touched rows of the shard, ascending, some at once; the shard's first is 0."""
        marks = self.bits.numpy()
        for begin in range(0, len(marks), _BYTES_AT_ONCE):
            piece = marks[begin : begin + _BYTES_AT_ONCE]
            (places,) = piece.nonzero()
            if places.size:
                which, bit = np.unpackbits(piece[places][:, None], axis=1, bitorder="little").nonzero()
                yield torch.from_numpy((places[which] + begin) * 8 + bit)

    def rows_of(self, name: str) -> Iterator[Tensor]:
        """The touched rows of a part, in host memory, some at once."""
        if name in self.held:
            yield self.held[name]
        else:
            yield from self._rows_of(self.parts[name].tensor)

    def _rows_of(self, tensor: Tensor) -> Iterator[Tensor]:
        for ids in self.ids():
            yield tensor.detach()[ids.to(tensor.device)].cpu()


@dataclass
class Delta:
    """What a delta save writes in the place of whole tables.

    Attributes:
        base: that it builds on; links: deltas since the last full checkpoint, this one counted.
        shards: of this rank; names: of all tensors, on any rank, of which only touched rows are written.
    """

    base: Link
    links: int
    shards: list[TouchedShard]
    names: list[str]

    def entry(self) -> dict[str, Any]:
        """For state.json."""
        return {**self.base._asdict(), "links": self.links, "rows_of": self.names}


def touched_shards(tensors: Mapping[str, Any], bits: Mapping[ShardKey, Tensor]) -> list[TouchedShard]:
    """The shards of this rank that are watched, with their marks.

    Args:
        tensors: the state dict of model and optimizer; bits: of `TouchedRows.take`.
    """
    parts = row_parts(tensors)
    # In the order of the marks; a watched shard that is no tensor's would be lost.
    return [TouchedShard(key.table, key.row, marks, parts[key]) for key, marks in bits.items()]


def row_parts(tensors: Mapping[str, Any]) -> dict[ShardKey, dict[str, LocalShard]]:
    """Of each shard of a table on this rank, the tensors with its rows, as in `TouchedShard.parts`."""
    found: dict[ShardKey, dict[str, LocalShard]] = {}
    for table, parts in _tensors_of_rows(tensors):
        shards = {name: list(local_shards(tensor)) for name, tensor in parts.items()}
        for place, shard in enumerate(next(iter(shards.values()))):
            if len(shard.tensor):
                mine = {name: each[place] for name, each in shards.items()}
                found[ShardKey(table, shard.row, shard.column)] = mine
    return found


def rows_of_tables(tensors: Mapping[str, Any]) -> dict[ShardKey, tuple[Tensor, ...]]:
    """The same as bare tensors, weights first."""
    return {key: tuple(part.tensor for part in each.values()) for key, each in row_parts(tensors).items()}


def names_of_rows(tensors: Mapping[str, Any], tables: set[str]) -> list[str]:
    """The names in a checkpoint of all tensors that hold rows of some tables, if this rank has such rows."""
    return [name for table, parts in _tensors_of_rows(tensors) if table in tables for name in parts]


def _tensors_of_rows(tensors: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each table with its tensors by their names in a checkpoint: weights first, then states of its rows."""
    for name, weight in tensors["model"].items():
        if not (table := table_of(name)):
            continue
        states = tensors["optim"]["state"].get(f"fused.{name}", {})
        of_rows = {
            f"{_STATES}{name}.{key}": state
            for key, state in states.items()
            # A multiple where each column shard has a state of its own. What else there is are counters.
            if isinstance(state, ShardedTensor) and not state.size()[0] % weight.size()[0]
        }
        yield table, {f"model.{name}": weight, **of_rows}


def without_rows(tensors: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The state dict without these tensors."""
    left_out = set(names)
    optim = tensors["optim"]
    states = {
        key: {part: value for part, value in state.items() if f"optim.state.{key}.{part}" not in left_out}
        for key, state in optim["state"].items()
    }
    # Of those without any state there was nothing before either.
    states = {key: state for key, state in states.items() if state or not optim["state"][key]}
    model = {name: tensor for name, tensor in tensors["model"].items() if f"model.{name}" not in left_out}
    return {**tensors, "model": model, "optim": {**optim, "state": states}}


def delta_name(rank: int) -> str:
    return f"delta-{rank:05d}.safetensors"


def is_delta(name: str) -> bool:
    """Whether a file of a checkpoint has this name because it holds rows of a delta."""
    return name.startswith("delta-") and name.endswith(".safetensors")


def write_rows(
    folder: Path,
    file_name: str,
    shards: Sequence[TouchedShard],
    before: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Write a file of this rank, synced; -> its manifest entry, none where nothing was touched.

    Args:
        before: called before each piece, for tests.
    """
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    rows: dict[str, int] = {}
    described, writing = [], [shard for shard in shards if shard.count]
    for number, shard in enumerate(writing):
        layout |= {f"{number}.ids": (torch.int64, ()), f"{number}.first": (torch.int64, ())}
        rows |= {f"{number}.ids": shard.count, f"{number}.first": -(-shard.count // STRIDE)}
        parts = []
        for place, (name, part) in enumerate(shard.parts.items()):
            layout[f"{number}.{place}"] = part.tensor.dtype, tuple(part.tensor.shape[1:])
            rows[f"{number}.{place}"] = shard.count
            parts.append({"name": name, "shift": part.row - shard.row, "column": part.column})
        described.append({"table": shard.table, "parts": parts})
    if not writing:
        return {}
    file = folder / file_name
    notes = {"format": "tandemrec.delta", "shards": json.dumps(described)}
    with TensorStream(file, layout, rows, notes=notes) as stream:
        for number, shard in enumerate(writing):
            first, seen = [], 0
            for ids in shard.ids():
                before()
                stream.append(f"{number}.ids", ids + shard.row)
                first.append(ids[-seen % STRIDE :: STRIDE] + shard.row)
                seen += len(ids)
            stream.append(f"{number}.first", torch.cat(first))
            for place, name in enumerate(shard.parts):
                for piece in shard.rows_of(name):
                    before()
                    stream.append(f"{number}.{place}", piece)
    sync(file)
    return {file.name: stream.entry}
