"""Memory of a plan: what the planner may fill, what each rank then holds, and why nothing fitted."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ShardingOption, Storage, Topology

from embeddings.plan.file import SavedPlan
from embeddings.plan.request import Cluster
from embeddings.plan.tables import Table
from embeddings.private import set_reserved_topology, topology_of

# TorchRec's rule for dense weights: themselves, Adam's two moments, and gradients in DDP's buckets.
DENSE_COPIES = 6


class Reservation(FixedPercentageStorageReservation):  # type: ignore[misc]
    """Memory of a rank that tables must leave free: a share of it, and the dense weights.

    TorchRec's own takes its share from device memory alone, and so nothing at all on a CPU.
    """

    def __init__(self, share: float, dense: int, more: int = 0) -> None:
        super().__init__(share)
        self._share, self._dense = share, dense * (DENSE_COPIES + more)

    def left(self, memory: int) -> int:
        """Bytes of `memory` that tables may take; negative where not even the rest fits."""
        return int((1 - self._share) * memory) - self._dense

    def reserve(self, topology: Topology, *arguments: Any, **named: Any) -> Topology:
        """The topology with what is left."""
        super().reserve(topology, *arguments, **named)
        reserved = copy.deepcopy(topology)
        for device in reserved.devices:
            if topology.compute_device == "cpu":
                device.storage.ddr = self.left(device.storage.ddr)
            else:
                device.storage.hbm = self.left(device.storage.hbm)
        set_reserved_topology(self, reserved)
        return reserved


class StorageEstimator(EmbeddingStorageEstimator):  # type: ignore[misc]
    """TorchRec's estimate with the optimizer state as FBGEMM keeps it.

    TorchRec takes it for a share of the weights' bytes, which is too little where the weights are half
    precision (the state stays fp32) and for row-wise state of column shards (each keeps its own).
    """

    def __init__(self, *, tables: Mapping[str, Table], **named: Any) -> None:
        super().__init__(**named)
        self._tables = tables

    def estimate(self, sharding_options: list[ShardingOption], *rest: Any, **named: Any) -> None:
        """Fill in the storage of every shard."""
        super().estimate(sharding_options, *rest, **named)
        for option in sharding_options:
            table = self._tables[option.name]
            for shard in option.shards:
                weights = table.weights(*shard.size)
                counted = {"row": -(-weights // table.dim), "weight": weights, "none": 0}
                missing = table.optimizer.state_bytes(*shard.size) - counted[table.optimizer.state]
                in_hbm = topology_of(self).compute_device == "cuda" and "uvm" not in option.compute_kernel
                shard.storage += Storage(hbm=missing, ddr=0) if in_hbm else Storage(hbm=0, ddr=missing)


@dataclass(frozen=True)
class RankMemory:
    """Bytes one rank holds for its tables.

    Attributes:
        weights, optimizer: of its shards, in device memory (on a CPU: host memory).
        buffers: ids and vectors of a step, caches of unified memory; TorchRec's estimate.
        host: rows and state in host memory behind a device's.
        host_weights, host_optimizer: of the shards there, which are part of `host`.
    """

    weights: int = 0
    optimizer: int = 0
    buffers: int = 0
    host: int = 0
    host_weights: int = 0
    host_optimizer: int = 0

    @property
    def total(self) -> int:
        """In the memory that bounds the plan."""
        return self.weights + self.optimizer + self.buffers

    def __add__(self, other: RankMemory) -> RankMemory:
        return RankMemory(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def memory_of_ranks(
    options: Iterable[ShardingOption], tables: Mapping[str, Table], world_size: int, device: str
) -> list[RankMemory]:
    """What each rank holds under the chosen options."""
    held = [RankMemory() for _ in range(world_size)]
    for option in options:
        table = tables[option.name]
        for shard in option.shards:
            weights, optimizer = table.weights(*shard.size), table.optimizer.state_bytes(*shard.size)
            if "uvm" in option.compute_kernel and device == "cuda":
                there = RankMemory(0, 0, shard.storage.hbm, shard.storage.ddr, weights, optimizer)
            else:
                buffers = memory_of(shard.storage, device) - weights - optimizer
                there = RankMemory(weights, optimizer, buffers)
            held[shard.rank] += there
    return held


def memory_of_plan(saved: SavedPlan, tables: Mapping[str, Table]) -> list[RankMemory]:
    """What each rank holds under a plan that may come from a file, which knows of no buffers."""
    held = [RankMemory() for _ in range(saved.world_size)]
    for name, sharding in ((n, s) for module in saved.plan.plan.values() for n, s in module.items()):
        table = tables[name]
        whole = [(rank, (table.rows, table.dim)) for rank in sharding.ranks or range(saved.world_size)]
        spec = sharding.sharding_spec
        cut = spec and [(shard.placement.rank(), tuple(shard.shard_sizes)) for shard in spec.shards]
        for rank, shape in cut or whole:
            weights, optimizer = table.weights(*shape), table.optimizer.state_bytes(*shape)
            if "uvm" in sharding.compute_kernel and saved.device == "cuda":
                held[rank] += RankMemory(0, 0, 0, weights + optimizer, weights, optimizer)
            else:
                held[rank] += RankMemory(weights, optimizer)
    return held


def memory_of(storage: Storage, device: str) -> int:
    """The bytes that bound the plan: device memory, on a CPU host memory."""
    return int(storage.ddr if device == "cpu" else storage.hbm)


@dataclass(frozen=True)
class TableNeed:
    """What a table needs at least, over all its allowed ways.

    Attributes:
        table: its name; total: bytes over all ranks.
        shard: bytes of the largest shard, in the way that has the smallest such; sharding: that way. With
            unified memory both count bytes of device and host memory.
        missing: bytes that an empty rank lacks for its largest shard; 0 where that fits.
    """

    table: str
    total: int
    shard: int
    sharding: str
    missing: int = 0


def shortfall(
    options: Sequence[ShardingOption], usable: int, cluster: Cluster, certain: bool
) -> tuple[str, list[TableNeed]]:
    """Why no plan fits -> (one line with the bytes missing, each table's need, largest first).

    The line is empty where shards and sums fit and only `certain` reasons are asked for: whether they also
    pack, only the planner knows.

    Args:
        usable: bytes of a rank that tables may take, of the memory that bounds the plan.
    """
    unified = cluster.device == "cuda" and any("uvm" in option.compute_kernel for option in options)
    host = cluster.ddr if unified else 0
    parts = _needs(options, cluster.device, usable, host)
    room = f"a rank has {gigabytes(usable)} for tables"
    if unified:
        room += f" and {gigabytes(host)} of host memory (--ddr) for those behind it"
    mending = "use more ranks, narrower tables or other sharding types; `tandemrec plan` tries them"
    total, widest = sum(part.total for part in parts), max(parts, key=lambda part: (part.missing, part.shard))
    if widest.missing:
        problem = (
            f"table {widest.table} does not fit: its largest {widest.sharding} shard takes "
            f"{gigabytes(widest.shard)}, {room}, {gigabytes(widest.missing)} missing"
        )
    elif total > cluster.world_size * (usable + host):
        problem = (
            f"the tables do not fit: together they take {gigabytes(total)}, {room}, "
            f"{gigabytes(total / cluster.world_size - usable - host)} missing on each (largest: "
            f"{parts[0].table}, {gigabytes(parts[0].total)})"
        )
    elif certain:
        return "", parts
    else:
        problem = (
            f"the tables take {gigabytes(total)} and {room}, enough in all, but their shards do not pack "
            f"(largest: {widest.table}, {gigabytes(widest.shard)} as {widest.sharding})"
        )
    return f"{problem}; {mending}", parts


def _needs(options: Iterable[ShardingOption], device: str, usable: int, host: int) -> list[TableNeed]:
    ways: dict[str, list[tuple[int, int, int, str]]] = {}
    for option in options:
        sizes, missing = [], 0
        for shard in option.shards:
            bound = memory_of(shard.storage, device)
            behind = int(shard.storage.ddr) if host else 0
            sizes.append(bound + behind)
            missing = max(missing, bound - usable, behind - host)
        ways.setdefault(option.name, []).append((missing, max(sizes), sum(sizes), option.sharding_type))
    parts = []
    for table, found in ways.items():
        missing, shard, _, sharding = min(found)
        parts.append(TableNeed(table, min(total for *_, total, _ in found), shard, sharding, missing))
    return sorted(parts, key=lambda part: -part.total)


def gigabytes(size: float) -> str:
    """`1,234.5 GB`, decimal; small sizes in MB."""
    return f"{size / 1e9:,.1f} GB" if abs(size) >= 1e9 else f"{size / 1e6:,.1f} MB"
