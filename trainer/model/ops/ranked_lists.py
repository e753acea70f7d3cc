"""Ranked lists of several heads: the order of each, and the first different columns of all, walked in turn.

Each has two forms that give the same numbers (property tests). The plain one sorts, as a device and an
exported model do. The one of the CPU ranks whole numbers of which no two are equal, which numpy sorts several
times faster than torch sorts floats, and finds what was seen before by its place in the window.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.top import ordered_bits
from trainer.model.ops.traced import is_traced, stable_sort

_LOW = (1 << 32) - 1


def best_first(value_RK: Tensor) -> Tensor:
    """The order of each row from the largest number on, int64 [R, K]; of equal ones the lower place first.

    NaN is as large as infinity.
    """
    if is_traced() or value_RK.device.type != "cpu" or value_RK.dtype != torch.float32:
        return stable_sort(value_RK, descending=True).indices
    key = (~ordered_bits(value_RK)).to(torch.int64).bitwise_left_shift_(32).numpy()
    key |= np.arange(value_RK.shape[1])
    key.sort(axis=1)
    key &= _LOW
    return torch.from_numpy(key)


def united(column_CHK: Tensor, real_CHK: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The first K different columns of heads' ranked lists that are walked in turn (TWIN, 4.2).

    Args:
        column_CHK: int64, the lists of H heads, best first; real_CHK: what of them counts, bool.
        width: X, of the windows.

    Returns:
        int64 and bool, both [C, min(K, X)]: ascending; columns that do not count are X - 1.
    """
    column_CP, real_CP = (part.transpose(1, 2).flatten(1) for part in (column_CHK, real_CHK))
    plain = is_traced() or column_CP.device.type != "cpu"
    return (united_by_sorting if plain else united_by_places)(column_CP, real_CP, k, width)


def united_by_sorting(column_CP: Tensor, real_CP: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The plain form, of lists that are one list already."""
    column_CP = torch.where(real_CP, column_CP, width)
    place = stable_sort(column_CP)
    again = F.pad(place.values[:, 1:] == place.values[:, :-1], (1, 0))
    new = torch.zeros_like(real_CP).scatter(1, place.indices, ~again) & real_CP
    taken = new & (new.cumsum(1) <= k)
    order = torch.where(taken, column_CP, width).sort(dim=1).values[:, : min(k, width)]
    return order.clamp(max=width - 1), order < width


def united_by_places(column_CP: Tensor, real_CP: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The form of the CPU: a column is new at the first place that has it."""
    column, real = column_CP.numpy(), real_CP.numpy()
    (rows, places), kept = column.shape, min(k, width)
    cell = column + np.arange(rows)[:, None] * width
    place = np.broadcast_to(np.arange(places, dtype=np.int32), column.shape)
    first = np.full(rows * width, places, dtype=np.int32)
    # Of several numbers for one cell the last one stays, so they are written from the last place on.
    first[cell[real][::-1]] = place[real][::-1]
    new = (first[cell] == place) & real
    member = np.zeros(rows * width, dtype=bool)
    member[cell[new & (new.cumsum(1, dtype=np.int32) <= k)]] = True
    row, found = np.divmod(np.flatnonzero(member), width)
    count = np.bincount(row, minlength=rows)
    ascending = np.full((rows, kept), width - 1)
    ascending[row, np.arange(row.size) - np.repeat(count.cumsum() - count, count)] = found
    return torch.from_numpy(ascending), torch.from_numpy(np.arange(kept) < count[:, None])
