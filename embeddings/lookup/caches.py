"""Tables whose rows lie in host memory behind a cache on the device, and caches that are filled ahead.

TorchRec's `PrefetchTrainPipelineSparseDist` has the cache of a later batch filled while the present one is
computed. FBGEMM must know that from the start (`prefetch_pipeline`): only then the rows of a batch stay in
the cache until its backward pass has updated them. Where it does not know, TorchRec 1.8 fills the caches all
the same, and logs that results may be wrong (`prefetch` in distributed/embedding_lookup.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import CacheAlgorithm
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn
from torchrec.distributed.types import CacheParams, EmbeddingModuleShardingPlan, ShardingPlan

from embeddings.errors import ConfigError
from embeddings.private import lookups

_CACHED = "fused_uvm_caching"


def with_prefetch(plan: ShardingPlan, modules: Collection[str]) -> tuple[ShardingPlan, list[str]]:
    """A plan whose caches are filled ahead in some modules and in no others.

    Args:
        modules: names of the collections, as in the plan, whose ids are known ahead of their batch.

    Returns:
        The plan, and the names of the tables whose entry had to be changed.

    Raises:
        ConfigError: a cache that is to be filled ahead has another algorithm than LRU.
    """
    placed, changed = {}, []
    for module, tables in plan.plan.items():
        entries = {}
        for table, entry in tables.items():
            wanted = entry.compute_kernel == _CACHED and module in modules
            entries[table] = entry
            cache = entry.cache_params or CacheParams()
            if bool(cache.prefetch_pipeline) == wanted:
                continue
            if wanted and cache.algorithm not in (None, CacheAlgorithm.LRU):
                raise ConfigError(
                    f"table {table}: its cache has the algorithm {cache.algorithm.name}, but only LRU caches "
                    'can be filled ahead; plan again, or set train.pipeline = "sparse_dist"'
                )
            entries[table] = replace(entry, cache_params=replace(cache, prefetch_pipeline=wanted))
            changed.append(table)
        placed[module] = EmbeddingModuleShardingPlan(entries)
    return ShardingPlan(placed), changed


def fills_caches(plan: ShardingPlan) -> bool:
    """Whether some table, on whatever rank it lies, has its cache filled ahead."""
    entries = [entry for tables in plan.plan.values() for entry in tables.values()]
    return any(entry.cache_params is not None and entry.cache_params.prefetch_pipeline for entry in entries)


def forget_prefetched(model: nn.Module) -> None:
    """Drop what caches keep ready for batches that will not be trained.

    Without it the next lookup would take the places of another batch's rows. Besides, each lookup locks the
    rows of its batch in the cache, and only a backward pass unlocks them. The cached rows themselves stay.
    Waits for the device.

    FBGEMM keeps the first stream that ever filled a cache, and has backward passes wait for that one alone.
    The next pipeline over the same model may have another stream, so it is forgotten too.
    """
    if torch.cuda.is_available():
        # The stream that fills the caches may still be at it.
        torch.cuda.synchronize()
    for kernel in _kernels(model):
        kernel.timesteps_prefetched.clear()
        kernel.lxu_cache_locations_list.clear()
        kernel.lxu_cache_locking_counter.zero_()
        kernel.prefetch_stream = None


@contextmanager
def unlocked(model: nn.Module) -> Iterator[None]:
    """Within this context lookups lock no rows in caches: no backward pass comes that would unlock them.

    Once an evaluation had locked a whole cache, all other rows would be read from host memory.
    """
    locking = [kernel for kernel in _kernels(model) if kernel.lock_cache_line]
    for kernel in locking:
        kernel.lock_cache_line = False
    try:
        yield
    finally:
        for kernel in locking:
            kernel.lock_cache_line = True


def flush_caches(model: nn.Module) -> None:
    """Have the tables in host memory hold what their caches do."""
    for kernel in _kernels(model):
        kernel.flush()


def drop_caches(model: nn.Module) -> None:
    """Forget all cached rows, since those in host memory are newer."""
    for kernel in _kernels(model):
        kernel.reset_cache_states()


def _kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's kernels of a model.

    TorchRec's sharded collections keep them in a plain list, so that they are no submodules.
    """
    for module in model.modules():
        if isinstance(module, SplitTableBatchedEmbeddingBagsCodegen):
            yield module
        for lookup in lookups(module):
            yield from _kernels(lookup)
