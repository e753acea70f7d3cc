"""From a model with meta tables and a plan to a sharded, trainable one with its first weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingPlan

from embeddings.first_rows import FirstWeights, initial_rows_, table_seed
from embeddings.groups import TableGroup
from embeddings.lookup.rounding import AS_THEY_ARE, Comms, codecs_of
from embeddings.lookup.sharded import UNASKED, BagSharder, SequenceSharder, Ways
from embeddings.optimizers import FusedOptimizer


def sharders(comms: Comms = AS_THEY_ARE, ways: Ways = UNASKED) -> list[ModuleSharder[nn.Module]]:
    """The sharders of the collections that groups compile to."""
    codecs = codecs_of(comms)
    # The scale of gradients in fp16 is fitted to each of them, not to their sums.
    return [BagSharder(codecs, ways), SequenceSharder(codecs, ways, each=comms.backward == "fp16")]


def attach_optimizer(collection: nn.Module, optimizer: FusedOptimizer) -> None:
    """Have every table of a collection updated inside the backward pass."""
    for parameter in collection.parameters():
        # TorchRec keeps and changes the arguments that it is given: new ones for each table.
        apply_optimizer_in_backward(optimizer.rule.kernel, [parameter], optimizer.arguments())
        if optimizer.max_gradient:
            # Not an argument of the optimizer's class, but of the kernels that stand in for it.
            clipping = {"gradient_clipping": True, "max_gradient": optimizer.max_gradient}
            parameter._optimizer_kwargs[0].update(clipping)  # type: ignore[attr-defined]


def shard(
    model: nn.Module,
    groups: Mapping[str, TableGroup],
    plan: ShardingPlan,
    device: torch.device,
    seed: int,
    comms: Comms = AS_THEY_ARE,
    ways: Ways = UNASKED,
) -> DistributedModelParallel:
    """Wrap a model whose collections lie on the meta device; tables get their seeded first weights.

    Forward must go through the returned module, or the dense weights of the ranks drift apart. The module
    keeps `comms`, so that a step can fit the scale to its gradients.
    """
    sharded = DistributedModelParallel(
        model, device=device, plan=plan, sharders=sharders(comms, ways), init_parameters=True
    )
    if device.type == "cpu" and dist.get_world_size() > 2:
        for module in sharded.modules():
            if isinstance(module, DistributedDataParallel):
                # A function without annotations, since torch does not understand postponed ones.
                module.register_comm_hook(None, lambda _, bucket: _average_in_order_of_ranks(bucket))
    first = {group.table_name(t.feature): group.first for group in groups.values() for t in group.tables}
    for name, weight in sharded.state_dict().items():
        table = table_of(name)
        if table in first:
            _initialise(weight, table_seed(seed, table), first[table])
    sharded.comms = comms
    return sharded


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
    """A table in one piece, from a model sharded over a single rank; half precision becomes float32."""
    if not isinstance(weight, ShardedTensor):
        return weight.float() if weight.dtype == torch.float16 else weight
    size = weight.metadata().size
    whole = torch.empty(size, dtype=torch.float32)
    for local in weight.local_shards():
        (row, column), (rows, columns) = local.metadata.shard_offsets, local.metadata.shard_sizes
        whole[row : row + rows, column : column + columns] = local.tensor
    return whole
