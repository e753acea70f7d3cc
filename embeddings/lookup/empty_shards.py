"""Row shards without rows: what FBGEMM's kernels on CPU need to bear them.

A table of R rows is cut into blocks of ceil(R / W) rows over W ranks, so the last ranks get none where R is
small: 31 rows on 9 ranks are seven blocks of 4, one of 3 and an empty one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torch import nn


def leaves_ranks_empty(rows: int, ranks: int) -> bool:
    """Whether row shards of a table leave some of so many ranks without a row."""
    return (ranks - 1) * -(-rows // ranks) >= rows


def admit_empty_shards(lookups: Iterable[nn.Module]) -> None:
    """Have the kernels of a sharded collection, as they were just made, work with tables of no rows.

    No id ever asks for such a table on this rank; but the kernels look at its size (fbgemm 1.8):
      * one goes on to the next table until it finds rows, so behind an empty last table it reads whatever
        lies in memory there: one row more is announced than there are;
      * without a single weight they take themselves for kernels of a GPU: one row is kept that no table has.

    Kernels of a GPU are left alone. As their sources read (fbgemm 1.8, nothing was tried): whether they are
    those of a CPU is told by weights that only a CPU has; they find a table's rows by its own offset, go
    through no others, update nothing without ids, and make no cache for tables without rows.
    """
    for lookup in lookups:
        for kernel in lookup.modules():
            if isinstance(kernel, SplitTableBatchedEmbeddingBagsCodegen) and kernel.use_cpu:
                _admit(kernel)


def _admit(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
    rows = [rows for rows, *_ in kernel.embedding_specs]
    if rows[-1] == 0:
        kernel.hash_size_cumsum[-1] += 1
    if not any(rows):
        weights = kernel.weights_host
        kernel.weights_host = nn.Parameter(torch.zeros(kernel.max_D, dtype=weights.dtype))
