"""Script: rows kept at their first lookup, and rows that begin anew, on two ranks and by every sharding,
compared with whole copies.

python -m tests.programs.forked_rows OUT

What differs is written to the folder given, one JSON file a rank: case -> what went wrong.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.first_rows import initial_rows_, table_seed
from embeddings.ids.new_rows import NewRows
from embeddings.lookup.before_change import RowsBeforeChange, RowsOfShards, combined, combined_rows
from embeddings.lookup.touched import ShardKey, TouchedRows
from tests.programs.tables_on_ranks import (
    SEED,
    SETS,
    TYPES,
    Case,
    case_of,
    each_table_otherwise,
    part_of,
    train_sharded,
)
from trainer.checkpoint.delta import row_parts
from trainer.ranks.process_group import Ranks, process_group

# Of both features, in all row shards.
NEW_ROWS = {"item": np.array([0, 3, 11, 12, 22]), "tag": np.array([1, 6])}
Copy = dict[ShardKey, list[Tensor]]


def tensors_of(model: DistributedModelParallel) -> dict[str, Any]:
    optim = {"state": {f"fused.{k}": v for k, v in model.fused_optimizer.state_dict()["state"].items()}}
    return {"model": model.state_dict(), "optim": optim}


def parts_of(model: DistributedModelParallel) -> dict[ShardKey, list[Tensor]]:
    parts = row_parts(tensors_of(model))
    return {key: [part.tensor for part in each.values()] for key, each in parts.items()}


def copy_of(parts: Copy) -> Copy:
    return {key: [part.clone() for part in each] for key, each in parts.items()}


def train(model: DistributedModelParallel, case: Case, ranks: Ranks, steps: list[int]) -> None:
    for step in steps:
        part = part_of(case.group.kind, step, ranks.rank, case.group.width)
        model.fused_optimizer.step()
        (part.loss(model(part)) * ranks.world_size).backward()
        model.fused_optimizer.step()


def same(one: Copy, other: Copy, but: RowsOfShards | None = None) -> bool:
    """Whether all rows are equal to the bit, but for some."""
    for key, parts in one.items():
        for mine, theirs in zip(parts, other[key], strict=True):
            differs = (mine != theirs).view(len(mine), -1).any(1)
            if but is not None and key in but:
                differs[but[key].ids] = False
            if differs.any():
                return False
    return True


def problems(case: Case, ranks: Ranks) -> list[str]:
    _, model = train_sharded(case, ranks)
    keeper, parts = RowsBeforeChange(model, parts_of(model)), parts_of(model)
    watched = {key: each for key, each in parts.items() if key in keeper.rows}
    found, start = [], copy_of(watched)
    keeper.begin()
    ends, branches = [], []
    for steps in ([5, 6], [6, 7], [3, 9]):
        train(model, case, ranks, steps)
        ends.append(copy_of(watched))
        branches.append(keeper.changed())
        before = keeper.before()
        for key, rows in before.items():
            kept = zip(rows.parts, start[key], strict=True)
            if not all(torch.equal(mine, whole[rows.ids]) for mine, whole in kept):
                found.append(f"rows of {key} were not as before")
        if same(start, watched):
            found.append("nothing was trained")
        if not same(start, watched, before):
            found.append("a row changed that was not kept")
        if not same(start, watched, branches[-1]):
            found.append("a row changed that is not among the changed ones")
        keeper.put(before)
        if not same(start, watched):
            found.append("not all is as before again")
        keeper.put(branches[-1])
        if not same(ends[-1], watched):
            found.append("the branch does not come back")
        keeper.put(before)
    before, nothing = keeper.before(), {key: rows.ids[:0] for key, rows in keeper.before().items()}
    for shares in ((0.2, 0.5, 0.3), (0.0, 1.0, 0.0), (0.5, 0.5, 0.0)):
        merged = {}
        for key, rows in before.items():
            none = type(rows)(nothing[key], tuple(part[:0] for part in rows.parts))
            merged[key] = combined_rows(rows, [branch.get(key, none) for branch in branches], shares)
        keeper.put(merged)
        whole = {
            key: [combined(values, shares) for values in zip(*(end[key] for end in ends), strict=True)]
            for key in watched
        }
        if not same(whole, watched):
            found.append(f"merged by {shares} otherwise than whole tables")
    # Another one goes on from what the first kept.
    keeper.put(before)
    again = RowsBeforeChange(model, parts)
    again.begin(before)
    train(model, case, ranks, [8])
    again.put(again.before())
    if not same(start, watched):
        found.append("what was kept before a restart is lost")
    return found


def problems_of_new_rows(case: Case, ranks: Ranks) -> list[str]:
    """Rows of new ids against those of a new table; all others, and all marks, stay."""
    _, model = train_sharded(case, ranks)
    parts, touched = parts_of(model), TouchedRows(model)
    before = copy_of(parts)
    NewRows(case.groups.values(), SEED, parts, touched).begin(NEW_ROWS)
    found, taken = [], touched.take()
    tables = {
        group.table_name(each): (group, each) for group in case.groups.values() for each in group.tables
    }
    for key, (weight, *states) in parts.items():
        group, table = tables[key.table]
        first = torch.empty(table.rows, table.dim, dtype=weight.dtype)
        initial_rows_(first, table_seed(SEED, key.table), group.first)
        own = [row - key.row for row in NEW_ROWS[table.feature].tolist() if 0 <= row - key.row < len(weight)]
        columns = slice(key.column, key.column + weight.shape[1])
        expected = [first[key.row : key.row + len(weight), columns], *(torch.zeros_like(s) for s in states)]
        for now, old, new in zip((weight, *states), before[key], expected, strict=True):
            if not torch.equal(now[own], new[own]):
                found.append(f"rows of {key} are not as in a new table")
            others = torch.ones(len(now), dtype=torch.bool)
            others[own] = False
            if not torch.equal(now[others], old[others]):
                found.append(f"other rows of {key} have changed")
        marks = np.unpackbits(taken[key].numpy(), bitorder="little").nonzero()[0].tolist()
        if marks != own:
            found.append(f"{marks} of {key} are marked, not {own}")
    if all(
        torch.equal(old, now)
        for key, each in before.items()
        for old, now in zip(each, parts[key], strict=True)
    ):
        found.append("nothing has changed")
    return found


def main(out: Path) -> None:
    torch.set_num_threads(1)
    with process_group() as ranks:
        report = {}
        for kind, types in TYPES.items():
            for sharding in types:
                if sharding != "data_parallel":
                    case = case_of(kind, sharding, "rowwise_adagrad")
                    report[f"{kind} {sharding}"] = problems(case, ranks) + problems_of_new_rows(case, ranks)
        for optimizer, dtype in (("adagrad", "fp16"), ("sgd", "fp32")):
            case = case_of("bag", "row_wise", optimizer, dtype=dtype)
            report[optimizer] = problems(case, ranks) + problems_of_new_rows(case, ranks)
        mixed = each_table_otherwise(case_of("bag", "row_wise", "rowwise_adagrad", sets=SETS))
        report["mixed sets"] = problems(mixed, ranks)
        (out / f"rank{ranks.rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
