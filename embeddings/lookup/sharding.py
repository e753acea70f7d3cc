"""From a model with meta tables and a plan to a sharded, trainable one with its first weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from embeddings.first_rows import initial_rows_
from embeddings.groups import TableGroup
from embeddings.lookup.mapped import mapped_rows
from embeddings.lookup.rounding import AS_THEY_ARE, Comms, codecs_of
from embeddings.lookup.sharded import DEFAULT_EXCHANGE, BagSharder, Exchange, SequenceSharder
from embeddings.lookup.shards import local_shards
from embeddings.optimizers import FusedOptimizer
from embeddings.private import host_rows_from, rows_left_unset, update_in_backward


def sharders(
    comms: Comms = AS_THEY_ARE, exchange: Exchange = DEFAULT_EXCHANGE
) -> list[ModuleSharder[nn.Module]]:
    """The sharders of the collections that groups compile to."""
    codecs = codecs_of(comms)
    # The scale of gradients in fp16 is fitted to each of them, not to their sums.
    return [BagSharder(codecs, exchange), SequenceSharder(codecs, exchange, each=comms.backward == "fp16")]


def attach_optimizer(collection: nn.Module, optimizer: FusedOptimizer) -> None:
    """Have every table of a collection updated inside the backward pass."""
    bound = optimizer.max_gradient
    # Not arguments of the optimizer's class, but of the kernels that stand in for it.
    clipping = {"gradient_clipping": True, "max_gradient": bound} if bound else {}
    for parameter in collection.parameters():
        update_in_backward(optimizer.rule.kernel, parameter, optimizer.arguments(), clipping)


def shard(
    model: nn.Module,
    groups: Mapping[str, TableGroup],
    plan: ShardingPlan,
    device: torch.device,
    seed: int,
    comms: Comms = AS_THEY_ARE,
    exchange: Exchange = DEFAULT_EXCHANGE,
    first_rows: bool = True,
    mapped_folder: Path | None = None,
) -> DistributedModelParallel:
    """Wrap a model whose collections lie on the meta device; tables get their seeded first weights.

    With `first_rows` false they hold anything, because a checkpoint is about to fill every row. With a
    `mapped_folder` the rows of a CPU lie in files there, see `embeddings.lookup.mapped`.

    Forward must go through the returned module, or the dense weights of the ranks drift apart. The module
    keeps `comms`, so that a step can fit the scale to its gradients.
    """
    mapped = nullcontext() if mapped_folder is None else host_rows_from(partial(mapped_rows, mapped_folder))
    with rows_left_unset(), mapped:
        sharded = DistributedModelParallel(
            model, device=device, plan=plan, sharders=sharders(comms, exchange), init_parameters=True
        )
    average_in_order(sharded)
    if first_rows:
        set_first_rows(sharded.state_dict(), groups.values(), seed)
    sharded.comms = comms
    return sharded


def average_in_order(sharded: DistributedModelParallel) -> None:
    """Have a newly wrapped model's dense gradients averaged in the order of ranks, where that is not so."""
    if sharded.device.type == "cpu" and dist.get_world_size() > 2:
        for module in sharded.modules():
            if isinstance(module, DistributedDataParallel):
                # A function without annotations, since torch does not understand postponed ones.
                module.register_comm_hook(None, lambda _, bucket: _average_in_order_of_ranks(bucket))


@torch.no_grad()
def set_first_rows(weights: Mapping[str, Any], groups: Iterable[TableGroup], seed: int) -> None:
    """Give the tables of some groups their first weights, which those of lanes do not add to: zeros.

    Args:
        weights: the state dict of a sharded model, whose other weights stay.
    """
    tables = {group.table_name(table): (group, table) for group in groups for table in group.all_tables}
    for name, weight in weights.items():
        group, table = tables.get(table_of(name), (None, None))
        if group is None or table is None:
            continue
        for part in local_shards(weight):
            if table.lane:
                part.tensor.zero_()
            else:
                of_table = group.first_seed(seed, table_of(name))
                initial_rows_(part.tensor, of_table, group.first, part.row, part.column)


def _average_in_order_of_ranks(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The average of a bucket's gradients over ranks, whatever else lies in the bucket.

    Gloo's ring adds the ranks up in an order that depends on a gradient's place in its bucket, and
    DistributedDataParallel makes other buckets after its first step. So the first step after a resume would
    round otherwise than the same step of a run that was never stopped, on more than two ranks.
    """
    mine = bucket.buffer()
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    work = dist.all_gather(parts, mine, async_op=True)
    assert work is not None

    def average(done: torch.futures.Future[object]) -> torch.Tensor:
        done.wait()
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total / len(parts)

    future: torch.futures.Future[torch.Tensor] = work.get_future().then(average)
    return future


def table_of(parameter: str) -> str:
    """`collections.attention.embedding_bags.attention__item_id.weight` -> `attention__item_id`."""
    parts = parameter.split(".")
    return parts[-2] if len(parts) > 1 and parts[-1] == "weight" else ""
