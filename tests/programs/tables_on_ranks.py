"""Every way to shard a group, trained on ragged batches and compared with plain tables. Run on two ranks.

Each rank makes the batches of all ranks, so it can do alone what they do together: look the same bags up in
plain tables, add up the gradients of all ranks, and update with an optimizer from a library. What differs is
written to the folder given, one JSON file a rank: case -> largest differences.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.inputs.tables import initialise_unsharded
from embeddings.first_rows import FirstWeights
from embeddings.groups import EmbeddingSet, TableGroup, TableSpec
from embeddings.lookup.compile import make_collection, weight_name
from embeddings.lookup.jagged import one_id_bags, select_bags, vectors_in_order
from embeddings.lookup.plain import PlainBagCollection
from embeddings.lookup.rounding import AS_THEY_ARE, Comms
from embeddings.lookup.sharded import DEFAULT_EXCHANGE, Exchange
from embeddings.lookup.sharding import attach_optimizer, shard
from embeddings.lookup.shards import local_shards
from embeddings.optimizers import FusedOptimizer
from embeddings.plan.planner import make_plan
from embeddings.plan.request import PlanRequest, PlanRules, TableRule
from tests.programs.unique_indices import unique_indices_on_cpu
from trainer.assemble import cluster_of
from trainer.ranks.process_group import Ranks, process_group

ROWS = {"item": 23, "tag": 7}
SETS = ("a", "b", "c")
STEPS, SEED = 4, 5
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "rowwise_adagrad": lambda weights: RowWiseAdagrad(weights, lr=0.1, eps=1e-3),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1, eps=1e-3),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1),
}
# Column shards keep an accumulator each, the mean square of their own columns of a row.
BY_COLUMNS = ("column_wise", "grid_shard")
TYPES = {
    "bag": ("table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard", "data_parallel"),
    "sequence": ("table_wise", "row_wise", "column_wise"),
}


class ShardWiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad of each half of the columns by itself."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__(weights, {})
        self.totals = {w: torch.zeros(w.shape[0], 2, 1) for w in self.param_groups[0]["params"]}

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for weight, total in self.totals.items():
            gradient = weight.grad.unflatten(1, (2, -1))
            total.add_(gradient.square().mean(2, keepdim=True))
            weight.sub_(0.1 * (gradient / (total.sqrt() + 1e-3)).flatten(1))


@dataclass(frozen=True)
class Case:
    """Two groups of one kind, of which one looks up all bags and the other a choice of them."""

    groups: dict[str, TableGroup]
    comms: Comms = AS_THEY_ARE
    exchange: Exchange = DEFAULT_EXCHANGE
    rules: PlanRules = field(default_factory=PlanRules)

    @property
    def group(self) -> TableGroup:
        """What both have in common."""
        return self.groups["all"]


def case_of(
    kind: str,
    sharding: str,
    optimizer: str,
    comms: Comms = AS_THEY_ARE,
    *,
    max_gradient: float = 0.0,
    dtype: str = "fp32",
    sets: tuple[str, ...] = ("",),
) -> Case:
    # Sets are of two widths, in turn.
    tables = tuple(
        TableSpec(feature, rows, (8, 16)[place % 2], name)
        for place, name in enumerate(sets)
        for feature, rows in ROWS.items()
    )
    fused = FusedOptimizer(optimizer, 0.1, 1e-3, max_gradient)
    first = FirstWeights(scale=1.0)
    groups = {
        # Rounded as on a CPU, wherever this runs.
        name: TableGroup(
            name, tables, fused, first, (sharding,), kind, dtype,
            stochastic_rounding=False if dtype == "fp16" else None,
            sets=tuple(map(EmbeddingSet, sets)),
        )
        for name in ("all", "chosen")
    }  # fmt: skip
    return Case(groups, comms)


def cases() -> Iterator[tuple[str, Case]]:
    for kind, types in TYPES.items():
        for sharding in types:
            place = f"{kind} {sharding}"
            for optimizer in OPTIMIZERS:
                yield f"{place} {optimizer}", case_of(kind, sharding, optimizer)
            yield f"{place} half", case_of(kind, sharding, "rowwise_adagrad", dtype="fp16")
            for way in (Comms("fp16", "fp32"), Comms("fp32", "fp16"), Comms("bf16", "bf16")):
                yield f"{place} {way.forward} {way.backward}", case_of(kind, sharding, "adagrad", way)
            for optimizer in OPTIMIZERS if sharding != "data_parallel" else ():
                yield f"{place} {optimizer} clipped", case_of(kind, sharding, optimizer, max_gradient=0.02)


def set_cases() -> Iterator[tuple[str, Case]]:
    """Three sets of two widths, whose tables look the same features up."""
    for sharding in TYPES["bag"]:
        yield f"sets {sharding}", case_of("bag", sharding, "rowwise_adagrad", sets=SETS)
    for sharding in ("table_wise", "row_wise"):
        yield f"sets {sharding} half", case_of("bag", sharding, "rowwise_adagrad", dtype="fp16", sets=SETS)
        clipped = case_of("bag", sharding, "adagrad", max_gradient=0.02, sets=SETS)
        yield f"sets {sharding} clipped", clipped
    yield "sets mixed", each_table_otherwise(case_of("bag", "row_wise", "rowwise_adagrad", sets=SETS))


def each_table_otherwise(case: Case) -> Case:
    """The same, where the tables of a collection lie by four types in turn."""
    types = ("row_wise", "table_wise", "data_parallel", "table_row_wise")
    groups = {name: replace(group, sharding=types) for name, group in case.groups.items()}
    rules = {
        group.table_name(table): TableRule(sharding=(types[place % len(types)],))
        for group in groups.values()
        for place, table in enumerate(group.tables)
    }
    return replace(case, groups=groups, rules=PlanRules(tables=rules))


def distinct_cases() -> Iterator[tuple[str, Case]]:
    """Each row asked for once, a case a sharding type and optimizer; needs FBGEMM's kernel for it."""
    for sharding in TYPES["sequence"]:
        for optimizer in OPTIMIZERS:
            case = replace(case_of("sequence", sharding, optimizer), exchange=Exchange(distinct=True))
            yield f"sequence {sharding} {optimizer} distinct", case


def cases_of_nccl() -> Iterator[tuple[str, Case]]:
    """Bags that are reduced over ranks of unequal strides, padded and not; rows that do not travel once."""
    each = replace(case_of("sequence", "row_wise", "adagrad"), exchange=Exchange(distinct=False))
    yield "sequence row_wise each", each
    for sharding in ("row_wise", "table_row_wise", "grid_shard"):
        for padded in (True, False):
            case = replace(case_of("bag", sharding, "adagrad"), exchange=Exchange(padded=padded))
            yield f"bag {sharding} padded={padded}", case


class TwoLookups(nn.Module):
    """What the model does: one group looks up all bags, another one some of them in another order."""

    def __init__(self, collections: Mapping[str, nn.Module], groups: Mapping[str, TableGroup]) -> None:
        super().__init__()
        self.keys = {name: group.keys for name, group in groups.items()}
        self.collections = nn.ModuleDict(collections)

    def forward(self, part: Part) -> tuple[Tensor, Tensor]:
        found = self.collections["all"](part.bags), self.collections["chosen"](part.chosen)
        return vectors_in_order(found[0], self.keys["all"]), vectors_in_order(found[1], self.keys["chosen"])


@dataclass(frozen=True)
class Part:
    """One rank's part of a step: bags, some of them, and what the loss weighs their vectors with."""

    bags: KeyedJaggedTensor
    chosen: KeyedJaggedTensor
    weights: tuple[Tensor, Tensor]

    def to(self, device: torch.device) -> Part:
        weights = (self.weights[0].to(device), self.weights[1].to(device))
        return Part(self.bags.to(device), self.chosen.to(device), weights)

    def loss(self, found: tuple[Tensor, Tensor]) -> Tensor:
        return sum((vectors.square() * w).sum() for vectors, w in zip(found, self.weights, strict=True)) / 20


def part_of(kind: str, step: int, rank: int, width: int) -> Part:
    """Repeated ids; strides that differ from rank to rank. In the last step one rank has no bags at all, or,
    for sequences, all ids lie in one row, so that row-wise shards of other ranks are asked for nothing."""
    rng = torch.Generator().manual_seed(100 * step + rank)
    stride, last = (5, 17)[(rank + step) % 2], step == STEPS - 1
    if kind == "sequence":
        ids = torch.stack([torch.randint(0, rows, (stride,), generator=rng) for rows in ROWS.values()])
        ids *= not last
        bags = one_id_bags(list(ROWS), ids)
    else:
        stride *= not (last and rank == 1)
        lengths = torch.randint(0, 4, (len(ROWS), stride), generator=rng)
        counts = zip(ROWS.values(), lengths.sum(1).tolist(), strict=True)
        ids = torch.cat([torch.randint(0, rows, (count,), generator=rng) for rows, count in counts])
        bags = KeyedJaggedTensor(list(ROWS), ids, lengths=lengths.reshape(-1).int(), stride=stride)
    chosen = torch.randint(0, max(stride, 1), (min(stride, 3 + 4 * rank),), generator=rng)
    weights = [torch.randn(n, width, generator=rng) for n in (stride, chosen.numel())]
    return Part(bags, select_bags(bags, chosen), (weights[0], weights[1]))


def train_sharded(case: Case, ranks: Ranks) -> tuple[list[tuple[Tensor, Tensor]], DistributedModelParallel]:
    """Vectors that this rank was given at each step, and the trained model."""
    collections = {}
    for name, group in case.groups.items():
        collections[name] = make_collection(group, torch.device("meta"))
        attach_optimizer(collections[name], group.optimizer)
    model, groups = TwoLookups(collections, case.groups), case.groups.values()
    request = PlanRequest(model, tuple(groups), cluster_of(ranks), case.rules)
    # A grid has a part of the columns a node, and all ranks here are one node: two parts all the same.
    halves = patch("embeddings.plan.constraints._columns_a_shard", lambda dim, *_: dim // 2)
    with halves if case.group.sharding == ("grid_shard",) else nullcontext():
        plan = make_plan(request).plan
    planned = {table.sharding_type for module in plan.plan.values() for table in module.values()}
    assert planned == set(case.group.sharding)
    sharded = shard(model, case.groups, plan, ranks.device, SEED, case.comms, case.exchange)
    found = []
    for step in range(STEPS):
        part = part_of(case.group.kind, step, ranks.rank, case.group.width).to(ranks.device)
        sharded.fused_optimizer.step()
        vectors = sharded(part)
        found.append((vectors[0].detach().cpu().clone(), vectors[1].detach().cpu().clone()))
        # Gradients are averaged over ranks.
        (part.loss(vectors) * ranks.world_size).backward()
        sharded.fused_optimizer.step()
    return found, sharded


def train_plain(case: Case, ranks: Ranks) -> tuple[list[tuple[Tensor, Tensor]], nn.Module]:
    """The same on plain tables, with the bags of all ranks."""
    limit = case.group.optimizer.max_gradient
    plain = TwoLookups({name: plain_tables(group) for name, group in case.groups.items()}, case.groups)
    initialise_unsharded(plain, case.groups, SEED)
    name = case.group.optimizer.name
    by_columns = name == "rowwise_adagrad" and case.group.sharding[0] in BY_COLUMNS
    optimizer = (ShardWiseAdagrad if by_columns else OPTIMIZERS[name])(plain.parameters())
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(ranks.world_size):
            part = part_of(case.group.kind, step, rank, case.group.width)
            vectors = plain(part)
            if limit:
                for each in vectors:
                    each.register_hook(lambda gradient: gradient.clamp(-limit, limit))
            if rank == ranks.rank:
                found.append((vectors[0].detach().clone(), vectors[1].detach().clone()))
            part.loss(vectors).backward()
        optimizer.step()
    return found, plain


def moved_without_gradient(case: Case, ranks: Ranks) -> dict[str, float]:
    """Steps that train the first set alone, after steps that train all -> largest change of its rows and of
    all others."""
    _, sharded = train_sharded(case, ranks)
    before = {name: _own_parts(weight) for name, weight in sharded.state_dict().items()}
    own = case.group.columns(SETS[0])
    for step in range(STEPS):
        part = part_of(case.group.kind, step, ranks.rank, case.group.width).to(ranks.device)
        vectors = [each.clone() for each in sharded(part)]
        # What a model does that stops the gradient of a task at the sets of another one.
        for each in vectors:
            each[:, own.stop :] = each[:, own.stop :].detach()
        part.loss((vectors[0], vectors[1])).backward()
        sharded.fused_optimizer.step()
    moved = {True: 0.0, False: 0.0}
    for name, weight in sharded.state_dict().items():
        of_first = f"/{SETS[0]}/" in name
        for part_before, part_now in zip(before[name], _own_parts(weight), strict=True):
            moved[of_first] = max(moved[of_first], largest(part_before - part_now))
    return {"own": moved[True], "foreign": moved[False]}


def _own_parts(weight: Tensor | ShardedTensor) -> list[Tensor]:
    return [part.tensor.clone() for part in local_shards(weight)]


def plain_tables(group: TableGroup) -> PlainBagCollection:
    weights = {group.table_name(t): torch.empty(t.rows, t.dim) for t in group.tables}
    return PlainBagCollection(group, weights, trainable=True)


def differences(case: Case, ranks: Ranks) -> dict[str, float]:
    """Largest differences of vectors before training, vectors while training, and rows at the end."""
    found, sharded = train_sharded(case, ranks)
    expected, plain = train_plain(case, ranks)
    steps = [
        max(largest(a - b) for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(found, expected, strict=True)
    ]
    assert all(vectors.dtype == torch.float32 for pair in found for vectors in pair)
    rows = [rows_difference(group, sharded.state_dict(), plain) for group in case.groups.values()]
    return {"first": steps[0], "trained": max(steps), "rows": max(rows)}


def largest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0


def rows_difference(
    group: TableGroup, state: Mapping[str, Tensor | ShardedTensor], plain: nn.Module
) -> float:
    """Of the rows on this rank."""
    worst = 0.0
    for table in group.tables:
        expected = plain.get_parameter(f"collections.{group.name}.{group.table_name(table)}").detach()
        weight = state[f"collections.{group.name}.{weight_name(group, table)}"]
        places = [(weight, (0, 0))]
        if isinstance(weight, ShardedTensor):
            places = [(s.tensor, s.metadata.shard_offsets) for s in weight.local_shards()]
        for local, (row, column) in places:
            there = expected[row : row + local.shape[0], column : column + local.shape[1]]
            worst = max(worst, largest(local.cpu().float() - there))
    return worst


def main(out: Path, device: str = "") -> None:
    """`device`: `cuda` for a GPU a rank; left out, whatever the process group takes."""
    with process_group(timeout_s=60, **({"device": device} if device else {})) as ranks:
        wanted = [*cases(), *set_cases(), *(cases_of_nccl() if device == "cuda" else ())]
        found = {name: differences(case, ranks) for name, case in wanted}
        with unique_indices_on_cpu() as calls:
            found |= {name: differences(case, ranks) for name, case in distinct_cases()}
        for sharding in TYPES["bag"]:
            for optimizer in OPTIMIZERS:
                case = case_of("bag", sharding, optimizer, sets=SETS)
                found[f"isolated {sharding} {optimizer}"] = moved_without_gradient(case, ranks)
        # Two groups in each of the steps; GPUs have the kernel.
        assert ranks.device.type == "cuda" or len(calls) == 2 * STEPS * sum(1 for _ in distinct_cases())
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
