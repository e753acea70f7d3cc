"""TorchRec's sharded collections, with what ragged batches, sequences and data-parallel tables need besides.

Names of parameters and state are TorchRec's own, so a checkpoint does not depend on anything done here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    LazyGetItemMixin,
    ParameterSharding,
    ShardingEnv,
    ShardingType,
)
from torchrec.optim.fused import EmptyFusedOptimizer
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embeddings.groups import TableGroup
from embeddings.lookup.compile import BagCollection, SequenceCollection, side_by_side, weight_name
from embeddings.lookup.replicated import ReplicatedOptimizer
from embeddings.lookup.shared_ids import SharedIds
from embeddings.private import fused_optimizer, lookups, mark_as_updated, set_fused_optimizer

# Types whose bags are reduced over ranks.
_REDUCED = {t.value for t in (ShardingType.ROW_WISE, ShardingType.TABLE_ROW_WISE, ShardingType.GRID_SHARD)}


@dataclass(frozen=True)
class Exchange:
    """How what ranks send each other is made up. None: whatever suits the device.

    Attributes:
        distinct: ask for each row of a sequence once, however often it stands in a rank's bags (TorchRec's
            `use_index_dedup`), and add its gradients up before they travel. None: on GPUs, where FBGEMM has
            the kernel for it, and where there are others to ask.
        padded: give every rank as many bags as the one that has most, by empty ones, where bags are reduced
            over ranks. None: on CPUs, where gloo's all-gather, the backward of that reduction, takes tensors
            of one size only. NCCL takes others, as one reduction or broadcast a rank instead of one in all.
        once: send a feature's ids to a rank once, however many tables there look them up; False: as often,
            which is TorchRec's way.
    """

    distinct: bool | None = None
    padded: bool | None = None
    once: bool = True


DEFAULT_EXCHANGE = Exchange()


class Strides:
    """The largest stride over all ranks, asked for once for each batch however many groups look it up."""

    def __init__(self) -> None:
        self._features: Any = lambda: None
        self._largest = 0

    def largest(self, features: KeyedJaggedTensor) -> int:
        """Collective, unless the same object was asked for just before, which holds on all ranks alike."""
        if self._features() is not features:
            stride = torch.tensor(features.stride(), dtype=torch.int64)
            dist.all_reduce(stride, dist.ReduceOp.MAX)
            self._features, self._largest = weakref.ref(features), int(stride)
        return self._largest


def with_empty_bags(features: KeyedJaggedTensor, stride: int) -> KeyedJaggedTensor:
    """The same bags of every key, followed by empty ones up to `stride`."""
    keys, bags = features.keys(), features.stride()
    if bags == stride:
        return features
    lengths = F.pad(features.lengths().view(len(keys), bags), (0, stride - bags))
    return KeyedJaggedTensor(
        keys=keys,
        values=features.values(),
        lengths=lengths.reshape(-1),
        stride=stride,
        length_per_key=features.length_per_key_or_none(),
    )


def leaves_ranks_empty(rows: int, ranks: int) -> bool:
    """Whether row shards of a table leave some of so many ranks without a row.

    A table of R rows is cut into blocks of ceil(R / W) rows over W ranks, so the last ranks get none where R
    is small: 31 rows on 9 ranks are seven blocks of 4, one of 3 and an empty one.
    """
    return (ranks - 1) * -(-rows // ranks) >= rows


def admit_empty_shards(kernels: Iterable[nn.Module]) -> None:
    """Have the kernels of a sharded collection, as they were just made, work with tables of no rows.

    No id ever asks for such a table on this rank; but the kernels look at its size (fbgemm 1.8):
      * one goes on to the next table until it finds rows, so behind an empty last table it reads whatever
        lies in memory there, and one takes an empty table for the next table once more, whose gradients and
        rows it then reads as wide as the empty one is: one row is announced of every empty table;
      * without a single weight they take themselves for kernels of a GPU: one row is kept that no table has.

    Kernels of a GPU are left alone. As their sources read (fbgemm 1.8, nothing was tried): whether they are
    those of a CPU is told by weights that only a CPU has; they find a table's rows by its own offset, go
    through no others, update nothing without ids, and make no cache for tables without rows.
    """
    for lookup in kernels:
        for kernel in lookup.modules():
            if not isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen) or not kernel.use_cpu:
                continue
            rows = [rows for rows, *_ in kernel.embedding_specs]
            first = [0, *accumulate(max(each, 1) for each in rows)]
            announced = [*(first[table] for table in kernel.feature_table_map), first[-1]]
            kernel.hash_size_cumsum.copy_(torch.tensor(announced))
            if not any(rows):
                weights = kernel.weights_host
                kernel.weights_host = nn.Parameter(torch.zeros(kernel.max_D, dtype=weights.dtype))


@dataclass
class _Context(EmbeddingBagCollectionContext):  # type: ignore[misc]
    """TorchRec's, and the bags that the caller gave before any were added."""

    bags: int = -1


class _LaterVectors(LazyGetItemMixin[str, Tensor], LazyAwaitable[KeyedTensor]):  # type: ignore[misc]
    """What a function makes of vectors once they have come."""

    def __init__(self, vectors: LazyAwaitable[Any], change: Callable[[Any], KeyedTensor]) -> None:
        super().__init__()
        self._vectors, self._change = vectors, change

    def _wait_impl(self) -> KeyedTensor:
        return self._change(self._vectors.wait())


class ShardedBags(ShardedEmbeddingBagCollection):  # type: ignore[misc]
    """KJT of this rank's stride B -> KeyedTensor [B, width]; strides may differ from rank to rank."""

    def __init__(
        self,
        module: BagCollection,
        strides: Strides,
        padded: bool,
        device: torch.device,
        once: bool = True,
        **given: Any,
    ) -> None:
        super().__init__(module=module, device=device, **given)
        admit_empty_shards(lookups(self))
        plan = self.module_sharding_plan.values()
        reduced = any(table.sharding_type in _REDUCED for table in plan)
        self._pads = reduced and padded and given["env"].world_size > 1
        self._strides = strides
        self._shared: SharedIds | None = None
        if once and len(module.group.all_tables) > len(module.group.features):
            self._shared = SharedIds(self, given["env"], device, given["qcomm_codecs_registry"])
        _add_replicated(self, module.group)

    def create_context(self) -> _Context:
        return _Context()

    def input_dist(self, ctx: _Context, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        if self._pads:
            ctx.bags = features.stride()
            features = with_empty_bags(features, self._strides.largest(features))
        with self._shared.exchanging() if self._shared else nullcontext():
            return super().input_dist(ctx, features)

    def prefetch(self, dist_input: KJTList, *rest: Any, **named: Any) -> None:
        super().prefetch(self._repeated(dist_input), *rest, **named)

    def compute(self, ctx: _Context, dist_input: KJTList) -> list[Tensor]:
        vectors: list[Tensor] = super().compute(ctx, self._repeated(dist_input))
        return vectors

    def output_dist(self, ctx: _Context, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        return self._own(ctx, super().output_dist(ctx, output))

    def compute_and_output_dist(self, ctx: _Context, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        return self._own(ctx, super().compute_and_output_dist(ctx, self._repeated(input)))

    def _repeated(self, received: KJTList) -> KJTList:
        """Ids as often as tables look them up."""
        return self._shared.repeated(received) if self._shared else received

    def _own(self, ctx: _Context, vectors: LazyAwaitable[KeyedTensor]) -> LazyAwaitable[KeyedTensor]:
        """The vectors without those of the bags that `with_empty_bags` added."""
        if not self._pads:
            return vectors
        return _LaterVectors(
            vectors, lambda all_: KeyedTensor(all_.keys(), all_.length_per_key(), all_.values()[: ctx.bags])
        )


class ShardedSequences(ShardedEmbeddingCollection):  # type: ignore[misc]
    """KJT of stride B with one id a bag -> KeyedTensor [B, width]; strides may differ but not be 0.

    A rank without blocks repeats one of another rank (`trainer.data.reader`), so it has bags.
    """

    def __init__(self, module: SequenceCollection, **given: Any) -> None:
        super().__init__(module=module, **given)
        admit_empty_shards(lookups(self))
        self._group = module.group
        _add_replicated(self, module.group)

    def output_dist(self, ctx: Any, output: list[Tensor]) -> LazyAwaitable[KeyedTensor]:
        return _LaterVectors(super().output_dist(ctx, output), partial(side_by_side, group=self._group))

    def compute_and_output_dist(self, ctx: Any, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        vectors = super().compute_and_output_dist(ctx, input)
        return _LaterVectors(vectors, partial(side_by_side, group=self._group))


def _add_replicated(module: ShardedBags | ShardedSequences, group: TableGroup) -> None:
    """Give a module an optimizer for its data-parallel tables, if it has any, beside its fused ones."""
    replicated = {}
    for spec in group.all_tables:
        table = module.module_sharding_plan[group.table_name(spec)]
        if table.sharding_type == ShardingType.DATA_PARALLEL.value:
            name = weight_name(group, spec)
            replicated[name] = module.get_parameter(name)
            # Marks it as taken care of, or it would be handed to the optimizer of the dense weights too.
            mark_as_updated(replicated[name], EmptyFusedOptimizer())
    if replicated:
        optimizers = fused_optimizer(module).optimizers
        own = ReplicatedOptimizer(replicated, group.optimizer)
        set_fused_optimizer(module, CombinedOptimizer([*optimizers, ("", own)]))


class BagSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]
    """Shards `BagCollection`; offers row-wise types on CPU too, which TorchRec's own keeps for CUDA."""

    module_type, sharded_module_type = BagCollection, ShardedBags

    def __init__(self, codecs: Any = None, exchange: Exchange = DEFAULT_EXCHANGE) -> None:
        super().__init__(qcomm_codecs_registry=codecs)
        self._strides, self._padded, self._once = Strides(), exchange.padded, exchange.once

    def sharding_types(self, compute_device_type: str) -> list[str]:
        offered: list[str] = super().sharding_types("cuda")
        return offered

    def shard(
        self,
        module: BagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedBags:
        where = device or torch.device("cpu")
        return ShardedBags(
            module,
            self._strides,
            where.type == "cpu" if self._padded is None else self._padded,
            where,
            self._once,
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )


class SequenceSharder(EmbeddingCollectionSharder):  # type: ignore[misc]
    """Shards `SequenceCollection`; never data-parallel, whose kernel on CPU mixes up several features.

    Args:
        each: every gradient must travel by itself, so that rows are asked for once only where that is said.
    """

    module_type, sharded_module_type = SequenceCollection, ShardedSequences

    def __init__(self, codecs: Any = None, exchange: Exchange = DEFAULT_EXCHANGE, each: bool = False) -> None:
        super().__init__(qcomm_codecs_registry=codecs)
        self._distinct, self._each = exchange.distinct, each

    def distinct(self, group: TableGroup, device: torch.device, ranks: int) -> bool:
        """Whether rows are asked for once; FBGEMM's `max_gradient` would bound sums instead of each."""
        if self._distinct is not None:
            return self._distinct
        return device.type == "cuda" and ranks > 1 and not self._each and not group.optimizer.max_gradient

    def sharding_types(self, compute_device_type: str) -> list[str]:
        offered = super().sharding_types(compute_device_type)
        return [kind for kind in offered if kind != ShardingType.DATA_PARALLEL.value]

    def shard(
        self,
        module: SequenceCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedSequences:
        where = device or torch.device("cpu")
        return ShardedSequences(
            module,
            use_index_dedup=self.distinct(module.group, where, env.world_size),
            table_name_to_parameter_sharding=params,
            env=env,
            fused_params=self.fused_params,
            device=device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )
