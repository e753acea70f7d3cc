"""A state dict's copy in host memory, made once and filled for every save while training stands still.

torch's own stagers copy each shard of a GPU into pageable memory first, together with the whole storage that
it is a part of, and then once more into memory from the pinned allocator, which rounds a size up to a power
of two (torch 2.13, `_create_cpu_state_dict` in _state_dict_utils.py). Here every shard gets memory of exactly
its size, page-locked where that speeds up the copy, and all copies are begun before one wait for the last.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from embeddings.lookup.shards import local_shards, tensors_of
from embeddings.private import (
    Shard,
    ShardedTensor,
    ShardMetadata,
    pin_memory,
    remote_device,
    sharded_tensor_like,
    unpin_memory,
)

# Smaller tensors are copied as fast from ordinary memory as a lock of their pages takes.
_WORTH_PINNING = 1 << 20


def on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def wait_for_copies(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()


class StagedCopy:
    """Tensors of a state dict in host memory.

    Args:
        pinned: which tensors are copied from a device; pin, unpin: lock pages by address and bytes, and free
            them by address; wait: until the copies from a device are done. Others than the defaults are for
            tests.
    """

    def __init__(
        self,
        pinned: Callable[[Tensor], bool] = on_cuda,
        pin: Callable[[int, int], None] = pin_memory,
        unpin: Callable[[int], None] = unpin_memory,
        wait: Callable[[torch.device], None] = wait_for_copies,
    ) -> None:
        self._pinned, self._pin, self._unpin, self._wait = pinned, pin, unpin, wait
        self._leaves: list[Tensor | ShardedTensor] = []
        self._locked: list[int] = []

    @staticmethod
    def bytes_of(tree: Any) -> int:
        """Bytes that a copy of a tree takes."""
        return sum(part.nbytes for leaf in tensors_of(tree) for part in _parts(leaf))

    def make_room(self, tree: Any) -> None:
        """Allocate what the tensors of `tree` need.

        Raises:
            MemoryError: there is not enough, or its pages cannot be locked.
        """
        self.close()
        self._leaves = [self._room_for(leaf) for leaf in tensors_of(tree)]
        for source, room in self._pairs(tree):
            if self._pinned(source) and room.nbytes >= _WORTH_PINNING:
                try:
                    self._pin(room.data_ptr(), room.nbytes)
                except RuntimeError as error:
                    raise MemoryError(f"{room.nbytes / 1e6:,.1f} MB cannot be page-locked: {error}") from None
                self._locked.append(room.data_ptr())

    def fits(self, tree: Any) -> bool:
        """Whether the memory is that of the tensors of `tree`."""
        sizes, own = (
            [part.shape for leaf in leaves for part in _parts(leaf)]
            for leaves in (tensors_of(tree), self._leaves)
        )
        return sizes == own

    def take(self, tree: Any) -> Any:
        """The tree with copies of its tensors, which stay as they are until the next call."""
        devices = set()
        with torch.no_grad():
            for source, room in self._pairs(tree):
                room.copy_(source, non_blocking=True)
                if self._pinned(source):
                    devices.add(source.device)
        for device in devices:
            self._wait(device)
        return _with_leaves(tree, iter(self._leaves))

    def close(self) -> None:
        """Give the memory back; copies that somebody still holds stay readable."""
        while self._locked:
            self._unpin(self._locked.pop())
        self._leaves = []

    def _pairs(self, tree: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for leaf, room in zip(tensors_of(tree), self._leaves, strict=True):
            yield from zip(_parts(leaf), _parts(room), strict=True)

    def _room_for(self, leaf: Tensor | ShardedTensor) -> Tensor | ShardedTensor:
        """As large, not yet filled and not yet pinned: a sharded tensor is checked against its metadata."""
        if not isinstance(leaf, ShardedTensor):
            return self._memory(leaf)
        metadata = leaf.metadata()
        return sharded_tensor_like(
            leaf,
            [Shard(self._memory(shard.tensor), _on_host(shard.metadata)) for shard in leaf.local_shards()],
            replace(metadata, shards_metadata=[_on_host(shard) for shard in metadata.shards_metadata]),
        )

    def _memory(self, like: Tensor) -> Tensor:
        if not self._pinned(like) or like.nbytes < _WORTH_PINNING:
            return torch.empty(like.shape, dtype=like.dtype)
        # Pages of its own: a page can be locked once only, and the C library puts two tensors into one.
        pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=like.dtype, count=like.numel()).view(like.shape)


def _on_host(shard: ShardMetadata) -> ShardMetadata:
    placement: Any = shard.placement
    return replace(shard, placement=remote_device(f"rank:{placement.rank()}/cpu"))


def device_of(tree: Any) -> torch.device | None:
    """The CUDA device that a state dict's tensors lie on; None where there is none."""
    parts = (part for leaf in tensors_of(tree) for part in _parts(leaf))
    return next((part.device for part in parts if on_cuda(part)), None)


def _with_leaves(tree: Any, leaves: Iterator[Tensor | ShardedTensor]) -> Any:
    """The same tree with these tensors; what else is in it stays."""
    if isinstance(tree, Mapping):
        return {key: _with_leaves(value, leaves) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)([_with_leaves(value, leaves) for value in tree])
    return next(leaves) if isinstance(tree, Tensor | ShardedTensor) else tree


def _parts(whole: Tensor | ShardedTensor) -> list[Tensor]:
    return [part.tensor for part in local_shards(whole)]
