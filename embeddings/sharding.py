"""From a model with meta tables to a sharded, trainable one: plan, placement, first weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingPlan
from torchrec.optim import RowWiseAdagrad

from embeddings.errors import ConfigError
from embeddings.groups import FusedOptimizer, TableGroup
from embeddings.init import FirstWeights, initial_rows_, table_seed

# Column shards keep one row-wise accumulator each, so such state cannot be resharded; and the CPU planner
# offers no row-wise bags. What is left on a CPU is whole tables.
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


def attach_optimizer(collection: nn.Module, optimizer: FusedOptimizer) -> None:
    """Have every table of a collection updated inside the backward pass."""
    # The TorchRec call keeps and changes the dict it is given: a fresh one each time.
    classes: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
        "rowwise_adagrad": (RowWiseAdagrad, {"lr": optimizer.learning_rate, "eps": optimizer.eps}),
        "adagrad": (torch.optim.Adagrad, {"lr": optimizer.learning_rate, "eps": optimizer.eps}),
        "sgd": (torch.optim.SGD, {"lr": optimizer.learning_rate}),
    }
    kind, arguments = classes[optimizer.name]
    for parameter in collection.parameters():
        apply_optimizer_in_backward(kind, [parameter], dict(arguments))


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
    planner = EmbeddingShardingPlanner(topology=topology, constraints=_constraints(groups, device.type))
    with _plan_errors(world_size, device.type):
        return planner.collective_plan(model, [EmbeddingBagCollectionSharder()], dist.GroupMember.WORLD)


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
    planner = EmbeddingShardingPlanner(topology=topology, constraints=_constraints(groups, device))
    with _plan_errors(world_size, device):
        return planner.plan(model, [EmbeddingBagCollectionSharder()])


def _constraints(groups: Iterable[TableGroup], device: str) -> dict[str, ParameterConstraints]:
    return {
        group.table_name(table.feature): ParameterConstraints(
            sharding_types=list(group.sharding or _DEFAULT_SHARDING[device]),
            # Without this the planner falls back to host memory unasked.
            compute_kernels=["fused"],
            pooling_factors=[1.0],
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


def shard(
    model: nn.Module, groups: Mapping[str, TableGroup], plan: ShardingPlan, device: torch.device, seed: int
) -> DistributedModelParallel:
    """Wrap a model whose collections lie on the meta device; tables get their seeded first weights.

    Forward must go through the returned module, or the dense weights of the ranks drift apart.
    """
    sharded = DistributedModelParallel(
        model, device=device, plan=plan, sharders=[EmbeddingBagCollectionSharder()], init_parameters=True
    )
    first = {group.table_name(t.feature): group.first for group in groups.values() for t in group.tables}
    for name, weight in sharded.state_dict().items():
        table = table_of(name)
        if table in first:
            _initialise(weight, table_seed(seed, table), first[table])
    return sharded


def table_of(parameter: str) -> str:
    """`collections.attention.embedding_bags.attention__item_id.weight` -> `attention__item_id`."""
    parts = parameter.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""


def _initialise(weight: Tensor | ShardedTensor, seed: int, first: FirstWeights) -> None:
    if isinstance(weight, ShardedTensor):
        for local in weight.local_shards():
            row, column = local.metadata.shard_offsets
            initial_rows_(local.tensor, seed, first, row, column)
    else:
        initial_rows_(weight, seed, first)


def initialise_unsharded(model: nn.Module, groups: Mapping[str, TableGroup], seed: int) -> None:
    """Give plain, unsharded tables the weights they would start with under any plan."""
    for group in groups.values():
        for table in group.tables:
            name = group.table_name(table.feature)
            for parameter, weight in model.named_parameters():
                if table_of(parameter) == name or parameter.endswith(f".{name}"):
                    initial_rows_(weight.data, table_seed(seed, name), group.first)


def whole_tensor(weight: Tensor | ShardedTensor) -> Tensor:
    """A table in one piece, from a model sharded over a single rank."""
    if not isinstance(weight, ShardedTensor):
        return weight
    whole = torch.empty(weight.metadata().size, dtype=weight.dtype)
    for local in weight.local_shards():
        (row, column), (rows, columns) = local.metadata.shard_offsets, local.metadata.shard_sizes
        whole[row : row + rows, column : column + columns] = local.tensor
    return whole
