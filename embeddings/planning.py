"""Where the tables lie: TorchRec's planner, asked by running ranks or offline, and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan

from embeddings.errors import ConfigError
from embeddings.groups import TableGroup
from embeddings.sharding import sharders

# Column shards keep one row-wise accumulator each, so such state cannot be resharded; and row-wise bags are
# padded on gloo. On a CPU, where memory is not the limit, whole tables do.
_RANKS_A_NODE = 8
_DEFAULT_SHARDING = {"cpu": ("table_wise",), "cuda": ("table_wise", "row_wise", "table_row_wise")}


@dataclass(frozen=True)
class Placement:
    """Where one table lies: a line of the printed plan."""

    table: str
    rows: int
    dim: int
    sharding: str
    kernel: str
    ranks: tuple[int, ...]

    @property
    def megabytes(self) -> float:
        """Weights in fp32, over all ranks."""
        return self.rows * self.dim * 4 / 1e6


def make_plan(
    model: nn.Module,
    groups: Iterable[TableGroup],
    device: torch.device,
    world_size: int,
    local_world_size: int,
) -> ShardingPlan:
    """Ask TorchRec's planner; collective, so that all ranks hold the same plan.

    Raises:
        ConfigError: no plan fits the allowed sharding types and the memory.
    """
    memory = {"hbm_cap": torch.cuda.mem_get_info(device)[1]} if device.type == "cuda" else {}
    topology = Topology(
        world_size=world_size, local_world_size=local_world_size, compute_device=device.type, **memory
    )
    planner = EmbeddingShardingPlanner(
        topology=topology, constraints=_constraints(groups, device.type, world_size)
    )
    with _plan_errors(world_size, device.type):
        return planner.collective_plan(model, sharders(), dist.GroupMember.WORLD)


def offline_plan(
    model: nn.Module, groups: Iterable[TableGroup], device: str, world_size: int, hbm: int | None = None
) -> ShardingPlan:
    """The plan that `make_plan` would find on such a cluster, without a process group or a GPU.

    Args:
        device: `cpu` or `cuda`; world_size: ranks; hbm: bytes of device memory a rank.

    Raises:
        ConfigError: no plan fits.
    """
    memory = {} if hbm is None else {"hbm_cap": hbm}
    topology = Topology(
        world_size=world_size,
        local_world_size=min(world_size, _RANKS_A_NODE),
        compute_device=device,
        **memory,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology, constraints=_constraints(groups, device, world_size)
    )
    with _plan_errors(world_size, device):
        return planner.plan(model, sharders())


def _columns_a_shard(dim: int, world_size: int) -> int:
    """Width of column shards, one a rank, in fours as the kernels work; TorchRec's default is 128."""
    return max(-(-dim // world_size) + 3 & ~3, 4)


def _constraints(
    groups: Iterable[TableGroup], device: str, world_size: int
) -> dict[str, ParameterConstraints]:
    return {
        group.table_name(table.feature): ParameterConstraints(
            sharding_types=list(group.sharding or _DEFAULT_SHARDING[device]),
            # Without this the planner falls back to host memory unasked; dense is data-parallel's only one.
            compute_kernels=["fused", "dense"],
            pooling_factors=[1.0],
            min_partition=_columns_a_shard(table.dim, world_size),
        )
        for group in groups
        for table in group.tables
    }


@contextmanager
def _plan_errors(world_size: int, device: str) -> Iterator[None]:
    try:
        yield
    except PlannerError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"no sharding plan for {world_size} rank(s) on {device}: {reason} "
            "Allow other types in groups.<name>.sharding, use more ranks or narrower tables."
        ) from None


def placements(plan: ShardingPlan, groups: Iterable[TableGroup]) -> list[Placement]:
    """The plan as lines, in the order of the groups and their tables."""
    found = {}
    for module in plan.plan.values():
        for table, sharding in module.items():
            found[table] = sharding
    return [
        Placement(
            name,
            table.rows,
            table.dim,
            found[name].sharding_type,
            found[name].compute_kernel,
            tuple(found[name].ranks),
        )
        for group in groups
        for table in group.tables
        for name in [group.table_name(table.feature)]
    ]
