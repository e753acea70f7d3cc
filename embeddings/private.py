"""Every private part of torch, TorchRec and FBGEMM that this project uses; no other file uses one.

A release may rename or change any of them without a word. `tests/embeddings/test_private.py` names each and
checks that the installed release still has it in the form that is needed here, so that an upgrade fails there
first. The releases in use are torch 2.13 and TorchRec 1.8.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.cuda._pin_memory_utils import pin_memory, unpin_memory
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torch.distributed.remote_device import _remote_device as remote_device

__all__ = [
    "EnumerableShardingSpec",
    "Shard",
    "ShardMetadata",
    "ShardedTensor",
    "pin_memory",
    "remote_device",
    "unpin_memory",
]

# Norms of many tensors by one kernel; the public way takes one kernel a tensor.
foreach_norm = torch._foreach_norm
# The operator that gives embedding_bag the gradient of the weights of its ids.
bag_weights_gradient = torch.ops.aten._embedding_bag_per_sample_weights_backward
# The base of every batch normalisation.
BatchNorm = nn.modules.batchnorm._BatchNorm


def default_store() -> Any:
    """The store of the default process group."""
    return cast(Any, dist.distributed_c10d)._get_default_store()


def backends(kind: str) -> dict[str, Any]:
    """Name of a process group of this rank -> its backend, of the groups that have one of a kind (`nccl`)."""
    by_name: dict[str, Any] = {}
    device = torch.device("cuda" if kind == "nccl" else "cpu")
    for group, name in list(cast(Any, dist.distributed_c10d)._world.pg_names.items()):
        try:
            backend = group._get_backend(device)
        except RuntimeError:
            # It has none for this device.
            continue
        if backend.name() == kind:
            by_name[name] = backend
    return by_name


def collectives_begun(backend: Any) -> int:
    """How many collectives a backend has begun."""
    return int(backend._get_sequence_number_for_group())


def set_timeout(device: torch.device, timeout: datetime.timedelta) -> None:
    """How long collectives of the default group on a device wait from now on."""
    cast(Any, dist.group.WORLD)._get_backend(device)._set_default_timeout(timeout)


def sharded_tensor_like(whole: ShardedTensor, shards: Sequence[Shard], metadata: Any) -> ShardedTensor:
    """A sharded tensor of the same ranks, made of this rank's shards without asking the other ranks."""
    kind: Any = ShardedTensor
    made: ShardedTensor = kind._init_from_local_shards_and_global_metadata(
        list(shards), cast(ShardedTensorMetadata, metadata), process_group=cast(Any, whole)._process_group
    )
    return made


def update_in_backward(
    kind: type[torch.optim.Optimizer],
    parameter: nn.Parameter,
    arguments: Mapping[str, Any],
    of_kernels: Mapping[str, Any],
) -> None:
    """Have a parameter updated inside the backward pass.

    Args:
        arguments: of the optimizer's class.
        of_kernels: arguments that only the kernels have that stand in for the optimizer.
    """
    # Imported here, since it compiles functions, which whoever only talks to other ranks need not wait for.
    from torch.distributed.optim import _apply_optimizer_in_backward

    # The call keeps the dict that it is given, and TorchRec changes it: a new one for each parameter.
    _apply_optimizer_in_backward(kind, [parameter], dict(arguments))
    cast(Any, parameter)._optimizer_kwargs[0].update(of_kernels)


def optimizer_class(parameter: Tensor) -> type[torch.optim.Optimizer] | None:
    """The optimizer that `update_in_backward` gave a parameter; None where it gave none."""
    kinds: Sequence[type[torch.optim.Optimizer]] = getattr(parameter, "_optimizer_classes", [])
    return kinds[0] if kinds else None


def mark_as_updated(parameter: Any, optimizer: Any) -> None:
    """Have TorchRec leave a parameter out of those that the optimizer of the dense weights gets."""
    parameter._in_backward_optimizers = [optimizer]


def lookups(module: nn.Module) -> Iterable[nn.Module]:
    """The kernels of a sharded collection, which keeps them in a plain list; none of another module."""
    kernels: Iterable[nn.Module] = getattr(module, "_lookups", ())
    return kernels


@contextmanager
def host_rows_from(make: Callable[[int, torch.dtype], Tensor]) -> Iterator[None]:
    """Within this context kernels on a CPU get the memory of rows and of their optimizer's state from `make`.

    Args:
        make: numbers and their type -> zeros, one dimension.
    """
    # Imported here, since it takes seconds, which whoever only talks to other ranks need not wait for.
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

    kind: Any = SplitTableBatchedEmbeddingBagsCodegen
    before = kind._apply_split

    def applying(self: Any, split: Any, prefix: str, dtype: torch.dtype, **named: Any) -> None:
        if split.host_size and named.get("preallocated_host_buffer") is None:
            named["preallocated_host_buffer"] = make(split.host_size, dtype)
        before(self, split, prefix=prefix, dtype=dtype, **named)

    kind._apply_split = applying
    try:
        yield
    finally:
        kind._apply_split = before


class KernelTable(NamedTuple):
    """A table of a kernel, on this rank.

    Attributes:
        row, column: of the whole table, where its shard begins; rows: of the shard.
        features: that look it up, whose ids stand one after the other.
    """

    name: str
    row: int
    column: int
    rows: int
    features: int


def kernel_tables(kernel: nn.Module) -> list[KernelTable]:
    """The tables of a kernel that updates rows in the backward pass, in the order of its ids.

    Empty for any other module: also for data-parallel tables, whose kernel leaves the update to others.
    """
    # Imported here, since it takes seconds, which whoever only talks to other ranks need not wait for.
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen

    inner = getattr(kernel, "_emb_module", None)
    if not isinstance(inner, SplitTableBatchedEmbeddingBagsCodegen):
        return []
    found = []
    for table in cast(Any, kernel)._config.embedding_tables:
        place = table.local_metadata.shard_offsets if table.local_metadata is not None else (0, 0)
        row, column = place
        found.append(KernelTable(table.name, row, column, table.local_rows, table.num_features()))
    return found


def fused_optimizer(collection: nn.Module) -> Any:
    """The optimizer that a sharded collection shows."""
    return cast(Any, collection)._optim


def set_fused_optimizer(collection: nn.Module, optimizer: Any) -> None:
    """Have a sharded collection show another optimizer."""
    cast(Any, collection)._optim = optimizer


@contextmanager
def rows_left_unset() -> Iterator[None]:
    """Within this context TorchRec's kernels are made without drawing first weights for their rows.

    TorchRec draws them when it makes a kernel, and again as each table's `init_fn` says.
    """
    # Imported here, since it compiles functions, which whoever only talks to other ranks need not wait for.
    from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag

    kinds: list[Any] = [BaseBatchedEmbedding, BaseBatchedEmbeddingBag]
    before = [kind.init_parameters for kind in kinds]
    for kind in kinds:
        kind.init_parameters = lambda _: None
    try:
        yield
    finally:
        for kind, method in zip(kinds, before, strict=True):
            kind.init_parameters = method


def features_on(sharding: Any, rank: int) -> list[str]:
    """The features of the tables that a sharding has on a rank, one for each table, in the kernels' order."""
    return [
        name for group in sharding._grouped_embedding_configs_per_rank[rank] for name in group.feature_names()
    ]


@contextmanager
def exchanging_by(collection: nn.Module, shardings: Sequence[Any]) -> Iterator[None]:
    """Within this context a sharded collection of bags makes its exchange of ids as these shardings say.

    It is made when ids come for the first time.
    """
    module = cast(Any, collection)
    own, module._embedding_shardings = module._embedding_shardings, list(shardings)
    try:
        yield
    finally:
        module._embedding_shardings = own


def topology_of(estimator: Any) -> Any:
    """The topology that TorchRec's estimator of storage was made with."""
    return estimator._topology


def set_reserved_topology(reservation: Any, reserved: Any) -> None:
    """What a reservation of TorchRec's planner left of the topology, for the planner's messages."""
    reservation._last_reserved_topology = reserved


def critical_path(options: Any) -> Any:
    """TorchRec's model of a step's time, which it hands out in no other way."""
    # Imported here, since only a printed plan asks for it.
    from torchrec.distributed.planner.stats import _calculate_critical_path

    return _calculate_critical_path(options)


def compile_package(traced: Any, file: str) -> Any:
    """Compile an exported module into a file of machine code, and load it."""
    torch._inductor.aoti_compile_and_package(traced, package_path=file)
    return load_package(file)


def load_package(file: str) -> Any:
    """Machine code of `compile_package`, as a function of its arguments."""
    return torch._inductor.aoti_load_package(file)


def wrap_again(model: Any) -> None:
    """Have TorchRec wrap a model anew for the exchange of dense gradients, by the weights that have some."""
    inner = model._dmp_wrapped_module
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = model._dmp_wrapped_module = inner.module
    sharded = set(model._sharded_parameter_names(inner))
    if any(weight.requires_grad for name, weight in inner.named_parameters() if name not in sharded):
        model._data_parallel_wrapper.wrap(model, model._env, model.device)


def detach(pipeline: Any) -> None:
    """Give the model that one of TorchRec's pipelines has taken its own forward pass back.

    Where the first exchange of ids has failed, TorchRec 1.8 has taken the forward passes but not yet what
    exchanges the ids, gives the former back, and then says that these are unequally many
    (`_pipeline_detach_model` in train_pipeline/utils.py), in the place of what went wrong.
    """
    with suppress(AssertionError):
        pipeline.detach()
