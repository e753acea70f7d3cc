"""The process group: what the launcher says, and the few collectives the trainer needs of its own."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """This process's place among its peers.

    Attributes:
        rank, world_size, local_world_size: as given by the launcher; 0, 1, 1 without one.
        device: where this rank computes.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device

    @property
    def speaks(self) -> bool:
        """Only rank 0 prints and writes."""
        return self.rank == 0


@contextmanager
def process_group(timeout_s: float = 600) -> Iterator[Ranks]:
    """Join the launcher's process group (or make a group of one) and leave it at the end."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"the launcher says RANK={rank}, WORLD_SIZE={world_size}; start with torchx or torchrun"
        )
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield Ranks(rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device)
    finally:
        dist.destroy_process_group()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on every rank; the argument stays as it is."""
    total = values.clone()
    dist.all_reduce(total)
    return total


def sum_counts(counts: Sequence[int]) -> list[int]:
    """Sum of equally long lists of counts over all ranks, on every rank."""
    total: list[int] = sum_over_ranks(torch.tensor(counts, dtype=torch.int64)).tolist()
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate tensors of unequal first size, [n_r, ...] on rank r, on every rank in rank order."""
    world_size = dist.get_world_size()
    if world_size == 1:
        return rows
    size = torch.tensor([rows.shape[0]], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size)]
    dist.all_gather(sizes, size)
    longest = int(torch.stack(sizes).max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])
