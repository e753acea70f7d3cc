"""Weights of other moments than that of a checkpoint, in files of their own in its folder.

A training that stands in a branch (`trainer.loop.fork`) needs besides its weights those at the fork, and
those at the end of each branch that is over: of tables the rows that differ, of all else everything.

fork-00000-base.safetensors  rows at the fork that rank 0 holds, in the form of `trainer.checkpoint.delta`
fork-00000-<n>.safetensors   which of those rows branch n changed, as they were at its end
fork-dense.safetensors       <moment>/<name>: every tensor that is no table's, flat, of each moment
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from embeddings.errors import CheckpointError
from embeddings.lookup.before_change import Rows, RowsOfShards
from embeddings.lookup.shards import LocalShard, local_shards
from embeddings.lookup.touched import ShardKey, empty_bits, mark
from embeddings.private import ShardedTensor
from trainer.checkpoint.delta import TouchedShard, row_parts, write_rows
from trainer.checkpoint.delta_files import ShardRows, open_rows
from trainer.checkpoint.files import Entries
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.sealed_folder import raise_of_store, sync

# The moment of the fork; the end of a branch has the branch's number.
BASE = "base"
_DENSE = "fork-dense.safetensors"
# Rows of a shard that are read together.
_ROWS_AT_ONCE = 1 << 16

# Of each shard, the tensors with its rows by their names in a checkpoint.
Parts = Mapping[ShardKey, Mapping[str, LocalShard]]


def branch_of(state: Mapping[str, Any]) -> str:
    """The branch inside which a checkpoint stands; empty where it stands inside none.

    Args:
        state: of the checkpoint; `fork` is a `trainer.loop.fork.Round`.
    """
    fork = state.get("fork")
    if not fork or not (fork["place"] or state["step"] > fork["step"]):
        return ""
    return str(fork["names"][fork["going"][fork["place"]]])


@dataclass(frozen=True)
class Moment:
    """Weights and optimizer states of one moment, in host memory; nobody changes them.

    Attributes:
        rows: of tables, those that are not what they are at the fork, or at the fork those that are another
            moment's; dense: all other tensors by their names in a checkpoint.
    """

    rows: RowsOfShards
    dense: Mapping[str, Tensor]


@dataclass(frozen=True)
class ForkFiles:
    """What a checkpoint keeps of a fork.

    Attributes:
        moments: by their names; parts: of this rank; digests: of `note`.
    """

    moments: Mapping[str, Moment]
    parts: Parts = field(repr=False)

    def write(self, folder: Path, rank: int) -> Entries:
        """Write this rank's files, synced; -> their manifest entries. Training may go on beside it."""
        entries: Entries = {}
        for name, moment in self.moments.items():
            shards = [self._shard(key, rows) for key, rows in moment.rows.items()]
            entries |= write_rows(folder, f"fork-{rank:05d}-{name}.safetensors", shards)
        if rank == 0:
            entries |= self._write_dense(folder / _DENSE)
        return entries

    def _shard(self, key: ShardKey, rows: Rows) -> TouchedShard:
        parts = self.parts[key]
        bits = empty_bits(len(next(iter(parts.values())).tensor))
        mark(bits, rows.ids)
        return TouchedShard(key.table, key.row, bits, dict(parts), dict(zip(parts, rows.parts, strict=True)))

    def _write_dense(self, file: Path) -> Entries:
        tensors = {f"{m}/{name}": t for m, moment in self.moments.items() for name, t in moment.dense.items()}
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            n: (t.dtype, ()) for n, t in tensors.items()
        }
        with TensorStream(file, layout, {name: t.numel() for name, t in tensors.items()}) as stream:
            for name, tensor in tensors.items():
                stream.append(name, tensor.reshape(-1))
        sync(file)
        return {file.name: stream.entry}


def dense_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of model and optimizer but rows of tables, by their names in a checkpoint.

    Args:
        tensors: the state dict of model and optimizer.

    Raises:
        ValueError: one is sharded, and no table's.
    """
    found = {f"model.{name}": tensor for name, tensor in tensors["model"].items()}
    for key, state in tensors["optim"]["state"].items():
        found |= {f"optim.state.{key}.{part}": value for part, value in state.items()}
    rows = {name for parts in row_parts(tensors).values() for name in parts}
    dense = {}
    for name, tensor in found.items():
        if isinstance(tensor, ShardedTensor):
            # A rank without any of a table's rows has none of its parts either.
            if name not in rows and any(part.tensor.numel() for part in local_shards(tensor)):
                raise ValueError(f"{name} is sharded and no table's")
        elif isinstance(tensor, Tensor):
            dense[name] = tensor
    return dense


def copied(dense: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in dense.items()}


def read_moments(
    folder: Path,
    names: Sequence[str],
    parts: Parts,
    watched: Mapping[ShardKey, int],
    dense: Mapping[str, Tensor],
) -> dict[str, Moment]:
    """What this rank needs of the moments of a verified checkpoint, by whatever plan they were written.

    Args:
        names: of the moments, `BASE` among them; parts: of this rank now; watched: the rows of its shards
            that moments have rows of; dense: the tensors as they are now.

    Raises:
        CheckpointError: they do not fit the model, or how its tables lie.
    """
    try:
        stored = load_safetensors((folder / _DENSE).read_bytes())
        rows = {name: open_rows(folder, partial(_is_of, name)) for name in names}
    except (OSError, SafetensorError) as error:
        raise_of_store(folder, error)
        raise CheckpointError(folder, f"its fork cannot be read: {error}") from None
    found = {}
    for name in names:
        tensors = {key.partition("/")[2]: t for key, t in stored.items() if key.partition("/")[0] == name}
        _check(folder, tensors, dense)
        layers = [rows[BASE], rows[name]] if name != BASE else [rows[BASE]]
        of_shards = {key: _rows_of(parts[key], key, count, layers) for key, count in watched.items()}
        shaped = {key: tensor.view(dense[key].shape) for key, tensor in tensors.items()}
        found[name] = Moment({key: rows for key, rows in of_shards.items() if len(rows.ids)}, shaped)
    return found


def _is_of(moment: str, name: str) -> bool:
    return name.startswith("fork-") and name.endswith(f"-{moment}.safetensors")


def _check(folder: Path, stored: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where what a fork holds whole is not what is whole now."""
    for name in sorted(stored.keys() | dense.keys()):
        if name not in stored or name not in dense or stored[name].numel() != dense[name].numel():
            what = f"the fork that it stands in fits other weights ({name} differs)"
            why = "until the next merge a table must neither become data-parallel nor cease to be"
            raise CheckpointError(folder, f"{what}; {why}")


def _rows_of(
    parts: Mapping[str, LocalShard], key: ShardKey, count: int, layers: Sequence[Sequence[ShardRows]]
) -> Rows:
    """The rows of a shard that the last layer has; columns that it lacks come from those before it."""
    layers = [[shard for shard in layer if shard.table == key.table] for layer in layers]
    pieces = []
    for begin in range(0, count, _ROWS_AT_ONCE):
        stop = min(begin + _ROWS_AT_ONCE, count)
        found = [ids for shard in layers[-1] for _, ids in shard.ids_between(key.row + begin, key.row + stop)]
        if not found:
            continue
        ids = torch.cat(found).unique() - key.row
        values = []
        for name, part in parts.items():
            window = torch.empty((stop - begin, *part.tensor.shape[1:]), dtype=part.tensor.dtype)
            for shard in (each for layer in layers for each in layer):
                shard.lay_over(name, window, part.row + begin, part.column)
            values.append(window[ids - begin])
        pieces.append(Rows(ids, tuple(values)))
    if not pieces:
        none = torch.empty(0, dtype=torch.int64)
        return Rows(none, tuple(part.tensor[:0].detach().cpu() for part in parts.values()))
    columns = zip(*(piece.parts for piece in pieces), strict=True)
    return Rows(torch.cat([piece.ids for piece in pieces]), tuple(torch.cat(each) for each in columns))
