"""A made-up model of one table, whose rows change as told, for tests of incremental checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, init_from_local_shards

from embeddings.lookup.shards import local_shards
from embeddings.lookup.touched import ShardKey, empty_bits, mark

TABLE, WEIGHT = "g__item", "collections.g.embedding_bags.g__item.weight"
STATE = f"optim.state.fused.{WEIGHT}.{TABLE}.momentum1"


def cut(whole: Tensor, rows: int, columns: int) -> ShardedTensor:
    """A tensor in shards of so many rows and columns, all on this rank, in one storage."""
    parts = [
        (piece, [first * rows, second * columns])
        for second, band in enumerate(whole.split(columns, 1))
        for first, piece in enumerate(band.split(rows))
    ]
    memory = torch.cat([part.reshape(-1) for part, _ in parts]).split([part.numel() for part, _ in parts])
    shards = [
        Shard.from_tensor_and_offsets(view.view(part.shape), place, 0)
        for view, (part, place) in zip(memory, parts, strict=True)
    ]
    return init_from_local_shards(shards, *whole.shape)


class TouchedTable:
    """A table in shards with row-wise state, and which of its rows were touched; as `TouchedRows`."""

    def __init__(self, rows: int, width: int, cut_rows: int, cut_columns: int, dtype: torch.dtype) -> None:
        rng = torch.Generator().manual_seed(0)
        self.weight = cut(torch.randn(rows, width, generator=rng).to(dtype), cut_rows, cut_columns)
        bands = -(-width // cut_columns)
        # One number a row and column shard, those of the shards one below the other.
        shards = [
            Shard.from_tensor_and_offsets(torch.zeros(len(part)), [column // cut_columns * rows + row], 0)
            for part, row, column in local_shards(self.weight)
        ]
        self.state = init_from_local_shards(shards, bands * rows)
        self.counter, self.dense = torch.zeros(1), torch.zeros(3)
        self.rows = {
            ShardKey(TABLE, row, column): len(part) for part, row, column in local_shards(self.weight)
        }
        self._bits: dict[ShardKey, Tensor] = {}

    def tensors(self) -> dict[str, Any]:
        states = {f"fused.{WEIGHT}": {f"{TABLE}.momentum1": self.state}, "dense.w": {"step": self.counter}}
        optim = {"state": states, "param_groups": [{"lr": 0.5}]}
        return {"model": {WEIGHT: self.weight, "w": self.dense}, "optim": optim}

    def take(self) -> dict[ShardKey, Tensor]:
        taken, self._bits = self._bits, {}
        return {key: taken.get(key, empty_bits(rows)) for key, rows in self.rows.items()}

    def touch(self, ids: Tensor, changes: bool = True) -> None:
        """Change rows, and mark them."""
        self.counter += 1
        self.dense += 0.25
        for (part, row, column), (state, *_) in zip(
            local_shards(self.weight), local_shards(self.state), strict=True
        ):
            key = ShardKey(TABLE, row, column)
            mine = ids[(ids >= row) & (ids < row + len(part))] - row
            mark(self._bits.setdefault(key, empty_bits(len(part))), mine)
            if changes:
                part[mine] += 1 + mine[:, None].to(part.dtype) % 7
                state[mine] += 1

    def zero(self) -> None:
        for part, *_ in (*local_shards(self.weight), *local_shards(self.state)):
            part.zero_()
        self.counter.zero_()
        self.dense.zero_()

    def contents(self) -> dict[str, Tensor]:
        """Name in a checkpoint -> the whole tensor."""
        found = {}
        for name, tensor in ((f"model.{WEIGHT}", self.weight), (STATE, self.state)):
            whole = torch.empty(tensor.size(), dtype=tensor.dtype)
            for part, row, column in local_shards(tensor):
                place = whole[row : row + len(part)]
                (place if part.dim() == 1 else place[:, column : column + part.shape[1]]).copy_(part)
            found[name] = whole
        return {**found, "model.w": self.dense.clone(), "optim.state.dense.w.step": self.counter.clone()}
