"""The parts of a tensor that lie on this rank, whether it is sharded or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from embeddings.private import ShardedTensor


class LocalShard(NamedTuple):
    """A part of a tensor that lies on this rank: its first row and column are those of the whole tensor."""

    tensor: Tensor
    row: int = 0
    column: int = 0


def local_shards(whole: Tensor | ShardedTensor) -> Iterator[LocalShard]:
    """The parts on this rank; an ordinary tensor is its own only part."""
    if isinstance(whole, ShardedTensor):
        for shard in whole.local_shards():
            yield LocalShard(shard.tensor, *shard.metadata.shard_offsets)
    else:
        yield LocalShard(whole)


def tensors_of(tree: Any) -> Iterator[Tensor | ShardedTensor]:
    """The tensors of a tree of mappings, lists and tuples, in its order."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for value in tree:
            yield from tensors_of(value)
    elif isinstance(tree, Tensor | ShardedTensor):
        yield tree
