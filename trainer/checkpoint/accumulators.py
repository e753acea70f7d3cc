"""What the optimizer of a table's rows has gathered, as a checkpoint holds it."""

from __future__ import annotations

import torch
from torch import Tensor

from embeddings.lookup.sharding import table_of
from trainer.checkpoint.tensors import TensorReader


def accumulator_of(weight: str) -> str:
    """The tensor of a table's optimizer. Only the first one is its own; FBGEMM's others are counters."""
    return f"optim.state.fused.{weight}.{table_of(weight)}.momentum1"


def accumulated(reader: TensorReader, accumulator: str, rows: int, start: int, stop: int) -> Tensor:
    """Of the rows [start, stop) of a table of so many rows.

    Row-wise there is one a row and column shard, each the mean over its columns: together their mean.
    """
    size = reader.shape(accumulator)
    begins = range(0, size[0], rows)
    parts = [reader.rows(accumulator, begin + start, begin + stop) for begin in begins]
    return torch.stack(parts).mean(0)


def updated(reader: TensorReader, weight: str, start: int, stop: int) -> Tensor | None:
    """Which of the rows [start, stop) of a table have ever had a gradient, by any task: bool [n].

    None where the optimizer keeps no state, which alone could tell.
    """
    names = [name for name in map(accumulator_of, (weight, *reader.lanes(weight))) if name in reader]
    if not names:
        return None
    rows, _ = reader.shape(weight)
    parts = [accumulated(reader, name, rows, start, stop).reshape(stop - start, -1) for name in names]
    found = torch.zeros(stop - start, dtype=torch.bool)
    for part in parts:
        found |= (part != 0).any(1)
    return found
