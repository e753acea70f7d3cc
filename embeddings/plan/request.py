"""The planner's question: a model with its table groups, the ranks, and what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from embeddings.groups import TableGroup
from embeddings.lookup.rounding import AS_THEY_ARE, Comms
from embeddings.plan.bandwidths import UNKNOWN, Bandwidths
from embeddings.plan.traffic import Lookup

UNIFIED = ("fused_uvm", "fused_uvm_caching")


@dataclass(frozen=True)
class Cluster:
    """What the tables are to lie on.

    Attributes:
        device: `cpu` or `cuda`; world_size: ranks; local_world_size: ranks of a node.
        hbm, ddr: bytes of device memory (0 on a CPU) and of host memory that one rank has.
        bandwidths: of GPUs; a CPU has TorchRec's defaults.
    """

    device: str
    world_size: int
    local_world_size: int
    hbm: int
    ddr: int
    bandwidths: Bandwidths = UNKNOWN

    @property
    def memory(self) -> int:
        """Bytes a rank has for its tables and everything else."""
        return self.ddr if self.device == "cpu" else self.hbm


@dataclass(frozen=True)
class TableRule:
    """What the planner may do with one table; empty = the defaults of its group and device.

    Attributes:
        sharding, kernels: sharding types and compute kernels.
        cache_load_factor: share of the rows that the device keeps of a `fused_uvm_caching` table; None =
            FBGEMM's 0.2. cache_algorithm: `lru` or `lfu`, which rows these are; None = `lru`.
    """

    sharding: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    cache_load_factor: float | None = None
    cache_algorithm: str | None = None


@dataclass(frozen=True)
class PlanRules:
    """What the planner may do.

    Attributes:
        allow_unified_memory: let the planner use host memory as device memory where nothing else fits.
        reserve: share of a rank's memory that tables leave free.
        tables: table name -> its own rule.
        even_within: how much slower than the fastest a plan may be whose memory is more even, as a share.
    """

    allow_unified_memory: bool = False
    reserve: float = 0.15
    tables: Mapping[str, TableRule] = field(default_factory=dict)
    even_within: float = 0.1


def keep_quiet(line: str) -> None:
    """Says nothing."""
    del line


@dataclass(frozen=True)
class PlanRequest:
    """A planner's question.

    Attributes:
        model: with tables on the meta device and fused optimizers attached; groups: its table groups.
        cluster: the ranks; rules: what is allowed; lookups: table -> what a step asks of it.
        comms: what vectors and gradients are rounded to on their way, by which the planner's time follows.
        say: is told now and again that a slow planner is still at work.
        more_dense: copies of the dense weights besides those that `DENSE_COPIES` counts.
    """

    model: nn.Module
    groups: tuple[TableGroup, ...]
    cluster: Cluster
    rules: PlanRules = PlanRules()
    lookups: Mapping[str, Lookup] = field(default_factory=dict)
    comms: Comms = AS_THEY_ARE
    say: Callable[[str], None] = keep_quiet
    more_dense: int = 0
