"""Private parts of torch and TorchRec are used in one file, and the installed releases have them all."""

from __future__ import annotations

import ast
import datetime
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.stats import _calculate_critical_path
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.sharding import (
    cw_sharding,
    dp_sharding,
    grid_sharding,
    rw_sharding,
    tw_sharding,
    twrw_sharding,
)
from torchrec.optim.optimizers import in_backward_optimizer_filter

from embeddings import private

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    path.relative_to(ROOT): ast.parse(path.read_text(encoding="utf-8"))
    for package in ("launch", "pipelines", "trainer", "embeddings")
    for path in sorted((ROOT / package).rglob("*.py"))
    # What protoc has generated uses its own library as it likes.
    if not path.name.endswith("_pb2.py")
}
HERE = Path("embeddings/private.py")
FOREIGN = {"torch", "torchrec", "fbgemm_gpu"}
# Public in spite of their names: of named tuples, of os, and ibis' own stand-in for a table.
PUBLIC = {"_replace", "_make", "_asdict", "_exit", "_"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST) -> set[str]:
    """Names that a file gives to functions, methods, attributes, fields and variables."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def of_plain_classes(tree: ast.AST) -> set[str]:
    """Attributes that classes without a base give to themselves: nothing of a library can have them."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and not node.bases]
    return set().union(*(defined(node) for node in classes))


def foreign_uses(tree: ast.AST, ours: set[str]) -> list[str]:
    """Private attributes that nothing of ours defines, and imports of private parts of the libraries."""
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            uses += [node.attr] if node.attr not in ours else []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)) and name.value not in ours:
                uses.append(str(name.value))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            uses += [part for part in parts if is_private(part)]
        if isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            uses += [p for p in parts if is_private(p) and parts[0] in FOREIGN]
    return uses


def test_no_other_file_uses_a_private_part_of_the_libraries() -> None:
    held = set(foreign_uses(SOURCES[HERE], set()))
    # A name that the libraries have, too, does not become ours by an assignment to it.
    ours = set().union(*(defined(tree) for tree in SOURCES.values())) - held | PUBLIC
    found = {
        str(file): foreign_uses(tree, ours | of_plain_classes(tree))
        for file, tree in SOURCES.items()
        if file != HERE
    }
    assert {file: uses for file, uses in found.items() if uses} == {}


@pytest.mark.parametrize(
    "code",
    [
        "from torch.distributed._shard import api",
        "from torch import _dynamo",
        "import torch._inductor",
        "torch._foreach_norm(x)",
        "self._lookups",
        "getattr(module, '_lookups', ())",
    ],
)
def test_a_use_is_seen(code: str) -> None:
    assert foreign_uses(ast.parse(code), {"_own"})


def test_own_private_names_are_none() -> None:
    assert not foreign_uses(ast.parse("scorer._own\nfrom trainer._x import _y\nrow._own()"), {"_own"})


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_sharded_tensors_are_made_and_described_as_needed() -> None:
    made = private.ShardedTensor._init_from_local_shards_and_global_metadata
    assert parameters(made)[:3] == ["local_shards", "sharded_tensor_metadata", "process_group"]
    assert "_process_group" in inspect.getsource(private.ShardedTensor)
    shard = private.ShardMetadata([0, 0], [2, 3], "rank:0/cpu")
    assert (shard.shard_offsets, shard.shard_sizes) == ([0, 0], [2, 3])
    place = private.remote_device("rank:3/cpu")
    assert (place.rank(), place.device(), str(place)) == (3, torch.device("cpu"), "rank:3/cpu")
    assert private.EnumerableShardingSpec([shard]).shards == [shard]


def test_pages_are_locked_by_address() -> None:
    assert parameters(private.pin_memory) == ["data_ptr", "size"]
    assert parameters(private.unpin_memory) == ["data_ptr"]


def test_an_optimizer_in_the_backward_pass_leaves_its_marks() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert private.optimizer_class(weight) is None
    private.update_in_backward(torch.optim.SGD, weight, {"lr": 0.5}, {"gradient_clipping": True})
    assert private.optimizer_class(weight) is torch.optim.SGD
    # What TorchRec reads, and what keeps the parameter from the optimizer of the dense weights.
    assert weight._optimizer_kwargs == [{"lr": 0.5, "gradient_clipping": True}]  # type: ignore[attr-defined]
    assert not dict(in_backward_optimizer_filter([("weight", weight)]))
    weight.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.tolist() == [0.5, 0.5]


def test_a_marked_parameter_is_left_out() -> None:
    weight = nn.Parameter(torch.ones(2))
    assert dict(in_backward_optimizer_filter([("weight", weight)]))
    private.mark_as_updated(weight, object())
    assert not dict(in_backward_optimizer_filter([("weight", weight)]))


@pytest.mark.parametrize("kind", [ShardedEmbeddingBagCollection, ShardedEmbeddingCollection])
def test_sharded_collections_have_lookups_and_an_optimizer(kind: type[nn.Module]) -> None:
    assert "self._lookups" in inspect.getsource(kind)
    assert "return self._optim" in inspect.getsource(kind.fused_optimizer.fget)  # type: ignore[attr-defined]
    assert private.lookups(nn.Linear(1, 1)) == ()


def test_bags_make_their_exchange_of_ids_from_their_shardings_when_ids_come() -> None:
    bags = ShardedEmbeddingBagCollection
    assert "self._embedding_shardings" in inspect.getsource(bags._create_input_dist)
    assert "self._create_input_dist(features.keys())" in inspect.getsource(bags.input_dist)
    for kind in (
        tw_sharding.BaseTwEmbeddingSharding,
        rw_sharding.BaseRwEmbeddingSharding,
        twrw_sharding.BaseTwRwEmbeddingSharding,
        grid_sharding.BaseGridEmbeddingSharding,
        dp_sharding.BaseDpEmbeddingSharding,
    ):
        assert "self._grouped_embedding_configs_per_rank" in inspect.getsource(kind.__init__)
    assert issubclass(cw_sharding.BaseCwEmbeddingSharding, tw_sharding.BaseTwEmbeddingSharding)


def test_the_planner_has_the_parts_that_are_replaced() -> None:
    assert "self._topology = topology" in inspect.getsource(EmbeddingStorageEstimator.__init__)
    assert "_last_reserved_topology" in inspect.getsource(FixedPercentageStorageReservation)
    assert parameters(_calculate_critical_path)[0] == "best_plan"
    assert private.critical_path([]).total() == 0


def test_process_groups_say_what_they_have_begun() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert isinstance(private.default_store().timeout, datetime.timedelta)
        (backend,) = private.backends("gloo").values()
        assert private.backends("nccl") == {}
        begun = private.collectives_begun(backend)
        dist.all_reduce(torch.ones(1))
        assert private.collectives_begun(backend) == begun + 1
        private.set_timeout(torch.device("cpu"), datetime.timedelta(seconds=70))
        assert callable(backend.abort)
    finally:
        dist.destroy_process_group()


def test_torch_has_the_kernels_and_the_compiler() -> None:
    norms = private.foreach_norm([torch.tensor([3.0, 4.0]), torch.tensor([-2.0])], 2)
    assert [float(norm) for norm in norms] == [5.0, 2.0]
    rows, part = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0]])
    ids, bags = torch.tensor([1, 0]), torch.zeros(2, dtype=torch.int64)
    gradient = private.bag_weights_gradient(part, rows, ids, torch.zeros(1, dtype=torch.int64), bags, 0)
    assert gradient.tolist() == [7.0, 3.0]
    assert isinstance(nn.BatchNorm1d(2), private.BatchNorm)
    assert "package_path" in parameters(torch._inductor.aoti_compile_and_package)
    assert parameters(torch._inductor.aoti_load_package)[0] == "path"


def test_kernels_draw_their_first_weights_in_one_place() -> None:
    from torchrec.distributed.batched_embedding_kernel import BaseBatchedEmbedding, BaseBatchedEmbeddingBag

    for kind in (BaseBatchedEmbedding, BaseBatchedEmbeddingBag):
        before = kind.init_parameters
        assert parameters(before) == ["self"]
        with private.rows_left_unset():
            assert kind.init_parameters is not before
        assert kind.init_parameters is before
