"""Counts what a rank gives to collectives, to hold against the forecast of `embeddings.plan.traffic`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collective(NamedTuple):
    """One collective that this rank took part in.

    Attributes:
        operation: torch's name, such as `alltoall_base_`.
        floats: whether vectors (or gradients) travel, else ids, lengths or sizes.
        sized: parts differ from rank to rank; where they need not, an all-to-all announces sizes.
        bytes: that leave this rank; what it keeps for itself is not counted.
    """

    operation: str
    floats: bool
    sized: bool
    bytes: int

    @property
    def serves_tables(self) -> bool:
        """Whether it carries ids, vectors or their gradients.

        The others average gradients or counts, or announce sizes.
        """
        return self.operation != "allreduce_" and (self.sized or not self.operation.startswith("alltoall"))


class CollectiveCounter(TorchDispatchMode):
    """A context that notes every collective of this thread, forward or backward, in `sent`.

    Collectives pass through torch's dispatcher whoever calls them: TorchRec, DistributedDataParallel, which
    averages gradients, or the trainer.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sent: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "c10d" and name in _BYTES:
            self.sent.append(_noted(name, args))
        return func(*args, **(kwargs or {}))

    def bytes_of(self, *, floats: bool, since: int = 0) -> int:
        """Bytes for tables from call `since` on: of vectors and gradients, or of ids and lengths."""
        return sum(s.bytes for s in self.sent[since:] if s.floats == floats and s.serves_tables)


def _noted(name: str, args: Sequence[Any]) -> Collective:
    tensors = list(_tensors(args[:2]))
    sized = name == "alltoall_base_" and bool(args[4])
    return Collective(name, tensors[0].is_floating_point(), sized, _BYTES[name](args))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for part in tree:
            yield from _tensors(part)


def _nbytes(tree: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(tree))


def _all_to_all(args: Sequence[Any]) -> int:
    given, splits = args[1], args[4]
    if not splits:
        return int(given.nbytes * (1 - 1 / dist.get_world_size()))
    away = sum(splits) - splits[dist.get_rank()]
    return away * given[0].numel() * given.element_size() if given.shape[0] else 0


def _all_gather(args: Sequence[Any]) -> int:
    return _nbytes(args[1]) * (dist.get_world_size() - 1)


def _reduce_scatter(args: Sequence[Any]) -> int:
    return _nbytes(args[1]) - _nbytes(args[0])


def _all_reduce(args: Sequence[Any]) -> int:
    """Bytes of an all-reduce around a ring."""
    ranks = dist.get_world_size()
    return 2 * (ranks - 1) * _nbytes(args[0]) // ranks


_BYTES: dict[str, Callable[[Sequence[Any]], int]] = {
    "alltoall_base_": _all_to_all,
    "allgather_": _all_gather,
    "_allgather_base_": _all_gather,
    "reduce_scatter_": _reduce_scatter,
    "_reduce_scatter_base_": _reduce_scatter,
    "allreduce_": _all_reduce,
}
