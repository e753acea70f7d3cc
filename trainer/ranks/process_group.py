"""The process group: what the launcher says, and the few collectives the trainer needs of its own."""

from __future__ import annotations

import datetime
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.errors import ConfigError, RankError
from embeddings.private import set_timeout
from trainer.ranks.device import DeviceName, DeviceReport, Machine, agree, choose, gpu_place, observe
from trainer.ranks.heartbeat import GRACE_S, Heartbeat, abort_collectives, collectives_begun, leave_in_time
from trainer.ranks.machine import keep_freed_memory
from trainer.sealed_folder import voice

# How gloo, NCCL and the store word it; torch raises a plain RuntimeError for most.
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
_CUT = re.compile(r"connection (closed|reset|refused)|broken pipe|ncclRemoteError", re.IGNORECASE)
# What gloo could not connect to, where that is the own machine.
_LOOPBACK = re.compile(r"remote=\[(127\.|::1\]|::ffff:127\.)")
_ANSWER_S, _AFTER_THE_CAUSE_S = 5.0, 1.0
# How much longer NCCL itself waits than the heartbeat.
_BACKSTOP_S = 60.0


@dataclass(frozen=True)
class Ranks:
    """This process's place among its peers.

    Attributes:
        rank, world_size, local_world_size: as given by the launcher; 0, 1, 1 without one.
        device: where this rank computes.
        store: shared by all ranks; under torchrun it outlives any of them. None before they have met.
        launcher: the process that supervises this one; None without torchrun.
        heartbeat: hears from the other ranks where collectives cannot raise, that is with NCCL; else None.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    store: dist.Store | None = None
    launcher: int | None = None
    heartbeat: Heartbeat | None = None

    @property
    def speaks(self) -> bool:
        """Only rank 0 prints and writes."""
        return self.rank == 0

    def check_launcher(self) -> None:
        """Stop where torchrun was killed: nobody else ends its ranks, and they would keep the run folder.

        Raises:
            RankError: the launcher is gone, or the heartbeat has found that another rank is.
        """
        if self.heartbeat is not None:
            self.heartbeat.check()
        if self.launcher is not None and os.getppid() != self.launcher:
            raise RankError(f"rank {self.rank}: the launcher (process {self.launcher}) is gone; start again")


@contextmanager
def process_group(
    timeout_s: float = 600, device: DeviceName = "auto", heartbeat: bool | None = None, alone: bool = False
) -> Iterator[Ranks]:
    """Join the launcher's process group (or make a group of one) and leave it at the end.

    Args:
        timeout_s: seconds that ranks wait for each other, at the start and in every collective.
        device: as `train.device`.
        heartbeat: whether a thread watches over the ranks; None = with NCCL, whose collectives do not raise.
        alone: this process is none of the launcher's ranks, though one of them has started it.

    Raises:
        ConfigError: the launcher's words make no sense, the device is not to be had, or the ranks cannot
            share what there is.
        RankError: another rank did not come, or was lost or silent for longer than that.
    """
    rank, world_size, local_rank, local_world_size = (0, 1, 0, 1) if alone else _places()
    voice.silent = rank > 0
    # Asked for the CPU, nothing here looks for another device.
    machine = Machine() if device == "cpu" else observe()
    try:
        choice = choose(device, machine, local_rank, local_world_size)
        taken = choice.device
        place = gpu_place(taken.index) if taken.type == "cuda" else ""
        report = DeviceReport(rank, taken.type, place, choice.note)
    except ConfigError as problem:
        # Raised once the others know it, which would else wait for this rank.
        taken, report = torch.device("cpu"), DeviceReport(rank, "", problem=str(problem))
    timeout = datetime.timedelta(seconds=timeout_s)
    launcher = os.getppid() if dist.is_torchelastic_launched() and not alone else None
    ranks = Ranks(rank, world_size, local_world_size, taken, None, launcher)
    with naming_the_lost(ranks, lambda: "while the ranks met"):
        store = dist.HashStore() if world_size == 1 else _store_of_this_start(rank, world_size, timeout)
        agree(store, report, world_size)
    if report.why:
        voice.say(report.why)
    beating = (taken.type == "cuda") if heartbeat is None else heartbeat
    beats = _heartbeat(ranks, store, timeout_s) if beating and world_size > 1 else None
    ranks = replace(ranks, store=store, heartbeat=beats)
    try:
        with naming_the_lost(ranks, lambda: "while the ranks met"):
            _init(ranks, store, timeout)
        with naming_the_lost(ranks, lambda: "before or after training"):
            yield ranks
    except BaseException as error:
        if beats is not None:
            # To leave the group in order would mean to wait for a lost rank, or for collectives that this
            # rank will never join; the group goes with the process.
            beats.stop(well=False)
            leave_in_time()
        elif not isinstance(error, RankError):
            # What a broken device has to say to that is not what the run failed for.
            with suppress(Exception):
                if dist.is_initialized():
                    dist.destroy_process_group()
        raise
    if beats is not None:
        beats.stop()
    dist.destroy_process_group()


def _places() -> tuple[int, int, int, int]:
    """Rank, world size, local rank and local world size, as the launcher says.

    Raises:
        ConfigError: they are no numbers, or do not fit together.
    """
    said = {
        "RANK": os.environ.get("RANK", "0"),
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
        "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"),
        "LOCAL_WORLD_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1"),
    }
    if all(text.isdecimal() for text in said.values()):
        rank, world_size, local_rank, local_world_size = (int(text) for text in said.values())
        # Launchers made by hand often leave the last one out.
        local = local_rank < local_world_size or "LOCAL_WORLD_SIZE" not in os.environ
        if rank < world_size and local_world_size <= world_size and local:
            return rank, world_size, local_rank, local_world_size
    words = ", ".join(f"{name}={text}" for name, text in said.items())
    raise ConfigError(f"the launcher says {words}; start with torchx or torchrun")


def _init(ranks: Ranks, store: dist.Store, timeout: datetime.timedelta) -> None:
    own, device = dist.PrefixStore("process_group", store), ranks.device
    given: dict[str, Any] = {"store": own, "rank": ranks.rank, "world_size": ranks.world_size}
    if device.type == "cpu":
        keep_freed_memory()
        dist.init_process_group("gloo", timeout=timeout, **given)
        return
    torch.cuda.set_device(device)
    # On an error or time-out NCCL's watchdog then aborts the collectives, and leaves the process alone. There
    # is no other way to tell it.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "2")
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, device_id=device, **given)
    # Later than the heartbeat, which knows the lost rank.
    set_timeout(device, timeout + datetime.timedelta(seconds=_BACKSTOP_S))


def _heartbeat(ranks: Ranks, store: dist.Store, timeout_s: float) -> Heartbeat:
    """Started before the group is made, since NCCL waits for the other ranks in that, too."""
    backend = "nccl" if ranks.device.type == "cuda" else "gloo"
    beats = Heartbeat(
        ranks.rank,
        ranks.world_size,
        store,
        timeout_s,
        lambda: collectives_begun(backend),
        lambda: abort_collectives(backend),
        min(GRACE_S, timeout_s),
        # torch puts one of its own in front of it when the group is made, which marks each line once more.
        sys.excepthook,
    )
    beats.start()
    return beats


def _store_of_this_start(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The launcher's store, under a prefix that the ranks of this very start agree on.

    torchrun keeps one store over all its restarts (torch 2.13, `_bootstrap_store_info` in
    elastic/rendezvous/dynamic_rendezvous.py), in which the addresses of dead ranks still stand: a restarted
    rank that reads them before its peer has written new ones dials a port where nobody listens, or waits for
    ever. So each rank says a random word, rank 0 repeats all words that it sees with its own first, each rank
    that finds its word there says so, and rank 0's word becomes the prefix once all have.

    Raises:
        ConfigError: the launcher does not say where that store is.
        DistStoreError: a rank did not come.
    """
    try:
        store = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))[0]
    except ValueError as error:
        raise ConfigError(f"ranks cannot meet: {error}; start with torchx or torchrun") from error
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
        RankError: instead of what the backend raised, or of whatever followed from collectives that the
            heartbeat has aborted; any other error passes through.
    """
    beats = ranks.heartbeat
    try:
        with nullcontext() if beats is None else beats.at(where):
            yield
    except RankError:
        raise
    except Exception as error:
        if beats is not None and beats.blame:
            raise beats.acknowledge(where) from error
        if ranks.world_size == 1 or not tells_of_a_lost_rank(error):
            raise
        if beats is not None:
            # The main thread is awake; to ask the others takes a while, and the heartbeat may act meanwhile.
            beats.acknowledge(where)
        text = " ".join(str(error).split())
        raise RankError(f"rank {ranks.rank}, {where()}: {_blame(ranks, text)}") from error


def tells_of_a_lost_rank(error: BaseException) -> bool:
    """Whether an error is how the backend, or a rank, says that another is gone or does not answer."""
    text = str(error)
    if isinstance(error, RankError):
        return "waited in vain" in text
    words = _TIMED_OUT.search(text) or _CUT.search(text)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and words is not None)


def _blame(ranks: Ranks, text: str) -> str:
    # Without the place in gloo's source and the advice that follows the fact.
    text = re.sub(r"\[/[^\]]*\]\s*", "", text).split(". ")[0][:160]
    if not _TIMED_OUT.search(text):
        if ranks.launcher is not None:
            # The launcher names the rank whose error is the oldest, and the other one is still at its own.
            time.sleep(_AFTER_THE_CAUSE_S)
        return f"lost the connection to another rank, whose own error tells why ({text})"
    if _LOOPBACK.search(text) and ranks.local_world_size < ranks.world_size:
        fix = "set GLOO_SOCKET_IFNAME to the network's interface on all nodes, or mend /etc/hosts"
        return f"another node's host name stands for its loopback address there; {fix} ({text})"
    silent = _silent(ranks)
    if not silent:
        return f"the other ranks answer, but a collective timed out; see train.timeout_s ({text})"
    who = ", ".join(map(str, silent))
    return f"waited in vain for rank {who}, which hangs, is dead or cut off; see train.timeout_s ({text})"


def _silent(ranks: Ranks) -> list[int]:
    """Ranks that do not say within a few seconds that they have given up waiting, too."""
    others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
    store, heard = ranks.store, set[int]()
    if store is None:
        return others
    end = time.monotonic() + _ANSWER_S

    def ask() -> None:
        with suppress(RuntimeError):
            store.set(f"waited/{ranks.rank}", "1")
            while len(heard) < len(others) and time.monotonic() < end:
                heard.update(rank for rank in others if store.check([f"waited/{rank}"]))
                time.sleep(0.1)

    # Where the cable to the store's machine is cut, torch (2.13) waits for its answer until the kernel gives
    # the connection up: a quarter of an hour, whatever the store's time-out is.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S + 1)
    return [rank for rank in others if rank not in heard]


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
