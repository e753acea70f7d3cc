"""The process group: what the launcher says, and the few collectives the trainer needs of its own."""

from __future__ import annotations

import datetime
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.errors import ConfigError, RankError
from trainer.allocator import keep_freed_memory
from trainer.durable import voice

# How gloo, NCCL and the store word it; torch raises a plain RuntimeError for most.
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
_CUT = re.compile(r"connection (closed|reset|refused)|broken pipe|ncclRemoteError", re.IGNORECASE)
_ANSWER_S = 5.0


@dataclass(frozen=True)
class Ranks:
    """This process's place among its peers.

    Attributes:
        rank, world_size, local_world_size: as given by the launcher; 0, 1, 1 without one.
        device: where this rank computes.
        store: shared by all ranks; under torchrun it outlives any of them. None before they have met.
        launcher: the process that supervises this one; None without torchrun.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None = None
    launcher: int | None = None

    @property
    def speaks(self) -> bool:
        """Only rank 0 prints and writes."""
        return self.rank == 0

    def check_launcher(self) -> None:
        """Stop where torchrun was killed: nobody else ends its ranks, and they would keep the run folder.

        Raises:
            RankError: the launcher is gone.
        """
        if self.launcher is not None and os.getppid() != self.launcher:
            raise RankError(f"rank {self.rank}: the launcher (process {self.launcher}) is gone; start again")


@contextmanager
def process_group(timeout_s: float = 600) -> Iterator[Ranks]:
    """Join the launcher's process group (or make a group of one) and leave it at the end.

    Args:
        timeout_s: seconds that ranks wait for each other, at the start and in every collective.

    Raises:
        RankError: another rank did not come, or was lost or silent for longer than that.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not 0 <= rank < world_size:
        raise ConfigError(
            f"the launcher says RANK={rank}, WORLD_SIZE={world_size}; start with torchx or torchrun"
        )
    voice.silent = rank > 0
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    launcher = os.getppid() if dist.is_torchelastic_launched() else None
    ranks = Ranks(rank, world_size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device, None, launcher)
    with naming_the_lost(ranks, lambda: "while the ranks met"):
        store = dist.HashStore() if world_size == 1 else _store_of_this_start(rank, world_size, timeout)
        own = dist.PrefixStore("process_group", store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)
    ranks = replace(ranks, store=store)
    try:
        with naming_the_lost(ranks, lambda: "before or after training"):
            yield ranks
    except RankError:
        # To leave the group in order would mean to wait for the lost rank; it goes with the process.
        raise
    except BaseException:
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _store_of_this_start(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The launcher's store, under a prefix that the ranks of this very start agree on.

    torchrun keeps one store over all its restarts (torch 2.13, `_bootstrap_store_info` in
    elastic/rendezvous/dynamic_rendezvous.py), in which the addresses of dead ranks still stand: a restarted
    rank that reads them before its peer has written new ones dials a port where nobody listens, or waits for
    ever. So each rank says a random word, rank 0 repeats all words that it sees with its own first, each rank
    that finds its word there says so, and rank 0's word becomes the prefix once all have.
    """
    store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]
    mine, end = os.urandom(8).hex(), time.monotonic() + timeout.total_seconds()
    store.set(f"word/{rank}", mine)
    heard: list[str] = []
    while time.monotonic() < end:
        if rank == 0:
            heard = [store.get(f"word/{other}").decode() for other in range(world_size)]
            store.set("heard", " ".join(heard))
        else:
            heard = store.get("heard").decode().split()
        if len(heard) == world_size and heard[rank] == mine:
            store.set(f"{heard[0]}/{mine}", "")
            if store.check([f"{heard[0]}/{word}" for word in heard]):
                return dist.PrefixStore(heard[0], store)
        time.sleep(0.02)
    raise dist.DistStoreError("timed out")


@contextmanager
def naming_the_lost(ranks: Ranks, where: Callable[[], str]) -> Iterator[None]:
    """Turn a failed collective into one line that says which rank waited where, and for whom.

    Raises:
        RankError: instead of what the backend raised; any other error passes through.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if ranks.world_size == 1 or not tells_of_a_lost_rank(error):
            raise
        raise RankError(f"rank {ranks.rank}, {where()}: {_blame(ranks, text)}") from error


def tells_of_a_lost_rank(error: BaseException) -> bool:
    """Whether an error is how the backend says that another rank is gone or does not answer."""
    text = str(error)
    words = _TIMED_OUT.search(text) or _CUT.search(text)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and words is not None)


def _blame(ranks: Ranks, text: str) -> str:
    # Without the place in gloo's source and the advice that follows the fact.
    text = re.sub(r"\[/[^\]]*\]\s*", "", text).split(". ")[0][:160]
    if not _TIMED_OUT.search(text):
        return f"lost the connection to another rank, whose own error tells why ({text})"
    absent = _silent(ranks)
    if not absent:
        return f"the other ranks answer, but a collective timed out; see train.timeout_s ({text})"
    who = ", ".join(map(str, absent))
    return f"waited in vain for rank {who}, which hangs, is dead or cut off; see train.timeout_s ({text})"


def _silent(ranks: Ranks) -> list[int]:
    """Ranks that do not say within a few seconds that they have given up waiting, too."""
    others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    if ranks.store is None:
        return others
    end = time.monotonic() + _ANSWER_S
    with suppress(RuntimeError):
        ranks.store.set(f"waited/{ranks.rank}", "1")
        while others and time.monotonic() < end:
            others = [rank for rank in others if not ranks.store.check([f"waited/{rank}"])]
            time.sleep(0.1)
    return others


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
    """Concatenate tensors of unequal first size, [n_r, ...] on rank r, on rank 0 in rank order.

    The other ranks get none of the rows: only rank 0 needs memory for all of them.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return rows
    size = torch.tensor([rows.shape[0]], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size)]
    dist.all_gather(sizes, size)
    padded = rows.new_zeros(int(torch.stack(sizes).max()), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    if dist.get_rank() > 0:
        dist.gather(padded, dst=0)
        return rows[:0]
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.gather(padded, parts, dst=0)
    return torch.cat([part[: int(n)] for part, n in zip(parts, sizes, strict=True)])
