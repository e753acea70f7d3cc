"""Which task moves the weights that tasks share: AdaTask's accumulative update (AU), and shares of it (rAU).

AU_k is a mean over steps of the squares of what task k's own update moves a weight by, and rAU_k is AU_k over
the sum of those of all tasks, so that shares add up to 1. A task with more than nine tenths dominates the
weight.

Of dense weights the mean is exponential and exact, and part of the optimizer's state (`PerTaskAdam`). Of
tables it is that of the steps since the last report, on a sample of rows: some of the ids of each feature
that the first of these steps has on rank 0, drawn by the run's seed. Each step is looked at, and the rows of
all lanes, wherever they lie. So there is nothing to save: every save is right behind a report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.groups import TableGroup, TableName
from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import LocalShard, local_shards
from trainer.data.batch import RequestBatch
from trainer.update.dense_optimizer import PerTaskAdam

# Rows of a feature that are looked at.
_SAMPLE = 128
# A task with a larger share dominates.
_MOST = 0.9
# Of rows in host memory behind a cache, what the cache has is newer than what can be read.
_CACHED = "fused_uvm_caching"


class _Lane(NamedTuple):
    """A shard of a lane on this rank: of which main table and task, and the key of its ids in a batch."""

    table: str
    task: str
    key: str
    shard: LocalShard


class Dominance:
    """Watches the steps of the rule `per_task`.

    Args:
        model: sharded; groups: with their lanes.
        optimizer: of the dense weights; world_size: ranks; seed: `train.seed`.
    """

    def __init__(
        self,
        model: DistributedModelParallel,
        groups: Mapping[str, TableGroup],
        optimizer: PerTaskAdam,
        world_size: int,
        seed: int,
    ) -> None:
        self._optimizer, self._world_size, self._seed = optimizer, world_size, seed
        kernels = {
            name: table.compute_kernel for each in model.plan.plan.values() for name, table in each.items()
        }
        # Main table -> its width, and the tasks whose losses reach it, the first of which has the main table.
        self._tables: dict[str, tuple[int, tuple[str, ...]]] = {}
        self._keys = {group.table_name(spec): spec.key for group in groups.values() for spec in group.tables}
        for group in groups.values():
            losses = {each.name: each.losses for each in group.sets if each.lanes}
            for spec in group.tables:
                first, *others = losses.get(spec.set, ("",))
                table = group.table_name(spec)
                names = [table, *(f"{table}/{task}" for task in others)]
                if others and not any(kernels[name] == _CACHED for name in names):
                    self._tables[table] = spec.dim, (first, *others)
        self._lanes = list(self._lanes_of(model.state_dict()))
        self._rows: dict[str, Tensor] = {}
        self._places: list[tuple[_Lane, Tensor, Tensor]] = []
        self._before: list[Tensor] = []
        self._squares: dict[tuple[str, str], Tensor] = {}

    def _lanes_of(self, weights: Mapping[str, Any]) -> Iterator[_Lane]:
        for name, weight in weights.items():
            table = TableName.of(table_of(name))
            if table is not None and str(table.main) in self._tables:
                _, (first, *_) = self._tables[str(table.main)]
                for shard in local_shards(weight):
                    yield _Lane(str(table.main), table.lane or first, self._keys[str(table.main)], shard)

    @torch.no_grad()
    def before(self, batch: RequestBatch, number: int) -> None:
        """Called before a step updates tables; collective where it is the first since the last report."""
        if not self._rows and self._tables:
            self._draw(batch, number)
        self._before = [lane.shard.tensor[rows].float() for lane, rows, _ in self._places]

    @torch.no_grad()
    def after(self) -> None:
        """Called after it."""
        before, self._before = self._before, []
        for (lane, rows, places), old in zip(self._places, before, strict=True):
            moved = lane.shard.tensor[rows].float() - old
            columns = slice(lane.shard.column, lane.shard.column + moved.shape[1])
            self._squares[lane.table, lane.task][places, columns] += moved.square_()

    def entry(self) -> dict[str, Any]:
        """What is reported of the steps since the last report, which begin anew; collective.

        `mean` and `dominated`, each task's mean share and the share of the numbers that it dominates, of each
        `groups.NAME`, table and dense layer that several tasks move. What nobody has moved is left out.
        """
        of_tables = self._take()
        units: dict[str, dict[str, list[Tensor]]] = {}
        for table, of_tasks in of_tables.items():
            name = TableName.of(table)
            assert name is not None
            for unit in (f"groups.{name.group}", table):
                for task, squares in of_tasks.items():
                    units.setdefault(unit, {}).setdefault(task, []).append(squares)
        for task, of_weights in self._optimizer.squares.items():
            for weight, squares in of_weights.items():
                layer = weight.rpartition(".")[0]
                units.setdefault(layer, {}).setdefault(task, []).append(squares)
        found: dict[str, dict[str, dict[str, float]]] = {"mean": {}, "dominated": {}}
        for unit, of_tasks_ in units.items():
            shares = relative({task: _flat(parts) for task, parts in of_tasks_.items()})
            for task, share in shares.items():
                if share.numel():
                    found["mean"].setdefault(unit, {})[task] = float(share.mean())
                    found["dominated"].setdefault(unit, {})[task] = float((share > _MOST).float().mean())
        return {"dominance": found}

    def _draw(self, batch: RequestBatch, number: int) -> None:
        """Draw rows, the same on all ranks."""
        random = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        sources = [each for each in (batch.features, batch.context) if each is not None]
        features = {feature: source[feature].values() for source in sources for feature in source.keys()}  # noqa: SIM118
        drawn = torch.full((len(features), _SAMPLE), -1, dtype=torch.int64)
        for row, ids in zip(drawn, features.values(), strict=True):
            found = ids.cpu().long().unique()
            some = found[torch.randperm(len(found), generator=random)[:_SAMPLE]]
            row[: len(some)] = some
        device = batch.labels.device
        drawn = drawn.to(device)
        if self._world_size > 1:
            dist.broadcast(drawn, 0)
        self._rows = dict(zip(features, drawn, strict=True))
        self._places, self._squares = [], {}
        for lane in self._lanes:
            rows = self._rows[lane.key] - lane.shard.row
            (places,) = torch.nonzero((rows >= 0) & (rows < len(lane.shard.tensor)), as_tuple=True)
            if places.numel():
                self._places.append((lane, rows[places], places))
        for table, (dim, tasks) in self._tables.items():
            for task in tasks:
                self._squares[table, task] = torch.zeros(_SAMPLE, dim, device=device)

    def _take(self) -> dict[str, dict[str, Tensor]]:
        """Table -> task -> squares of all ranks, since the last call; collective."""
        squares, self._squares, self._rows, self._places = self._squares, {}, {}, []
        if self._world_size > 1 and squares:
            whole = torch.cat([part.flatten() for part in squares.values()])
            dist.all_reduce(whole)
            parts = whole.split([part.numel() for part in squares.values()])
            squares = dict(zip(squares, parts, strict=True))
        found: dict[str, dict[str, Tensor]] = {}
        for (table, task), part in squares.items():
            found.setdefault(table, {})[task] = part
        return found


def relative(squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """rAU of each task, of the numbers that some task has moved; they add up to 1 over tasks."""
    every = torch.stack(list(squares.values())).double()
    total = every.sum(0)
    shares = every[:, total > 0] / total[total > 0]
    return dict(zip(squares, shares, strict=True))


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
