"""Ids go to the rank that looks after them, and what it says of them comes back.

All tensors lie in host memory, whatever device trains: the group's backend is gloo.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

Int64s = npt.NDArray[np.int64]


class Exchange:
    """One exchange among all ranks: any number of lists of ids, each dealt to ranks.

    Args:
        owners: of each list, [n], the rank that each of its ids goes to.
        group: of all ranks.
    """

    def __init__(self, owners: Sequence[Int64s], group: dist.ProcessGroup | None) -> None:
        self._group, world_size = group, dist.get_world_size(group)
        # The ids of a list in the order of their ranks.
        self._orders = [np.argsort(each, kind="stable") for each in owners]
        sent = np.stack([np.bincount(each, minlength=world_size) for each in owners], axis=1)
        self._sent = torch.from_numpy(np.ascontiguousarray(sent, dtype=np.int64))
        self._received = torch.empty_like(self._sent)
        dist.all_to_all_single(self._received, self._sent, group=group)

    def send(self, columns: Sequence[Sequence[Int64s]]) -> list[list[Int64s]]:
        """Of each list, some numbers of each id -> the same of the ids that came, those of rank 0 first."""
        width = len(columns[0])
        lists = [
            np.stack([column[order] for column in of_list], axis=1)
            for of_list, order in zip(columns, self._orders, strict=True)
        ]
        came = self._exchange(lists, self._sent, self._received, width)
        return [[each[:, column].copy() for column in range(width)] for each in came]

    def answer(self, answers: Sequence[Int64s]) -> list[Int64s]:
        """Of each list, numbers for each id that came, [n, k] -> for each id that was given, in its order."""
        back = self._exchange(answers, self._received, self._sent, answers[0].shape[1])
        found = []
        for each, order in zip(back, self._orders, strict=True):
            values = np.empty_like(each)
            values[order] = each
            found.append(values)
        return found

    def _exchange(self, lists: Sequence[Int64s], sent: Tensor, came: Tensor, width: int) -> list[Int64s]:
        """Lists [n, width], cut as `sent` [ranks, lists] says -> as `came` says."""
        cut = [
            np.split(each, np.cumsum(sizes)[:-1]) for each, sizes in zip(lists, sent.T.numpy(), strict=True)
        ]
        parts = [part for of_rank in zip(*cut, strict=True) for part in of_rank]
        out = torch.from_numpy(np.concatenate(parts, dtype=np.int64))
        into = torch.empty((int(came.sum()), width), dtype=torch.int64)
        splits = came.sum(1).tolist(), sent.sum(1).tolist()
        dist.all_to_all_single(into, out, *splits, group=self._group)
        pieces = np.split(into.numpy(), np.cumsum(came.flatten().numpy())[:-1])
        count = came.shape[1]
        return [np.concatenate(pieces[number::count]) for number in range(count)]


def gathered(lists: Sequence[Int64s], group: dist.ProcessGroup | None) -> list[Int64s]:
    """Of each list, what all ranks have, those of rank 0 first; on every rank."""
    sizes = torch.tensor([each.size for each in lists], dtype=torch.int64)
    every = _of_every_rank(sizes, group)
    most = max(int(each.sum()) for each in every)
    if not most:
        return [np.zeros(0, dtype=np.int64) for _ in lists]
    # Gloo gathers tensors of one size only.
    mine = torch.zeros(most, dtype=torch.int64)
    mine[: int(sizes.sum())] = torch.from_numpy(np.concatenate(lists, dtype=np.int64))
    cut = [
        np.split(part.numpy()[: int(of_rank.sum())], np.cumsum(of_rank.numpy())[:-1])
        for part, of_rank in zip(_of_every_rank(mine, group), every, strict=True)
    ]
    return [np.concatenate(pieces) for pieces in zip(*cut, strict=True)]


def _of_every_rank(mine: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return found
