"""Two ranks on two GPUs: tables by rows, whose bags are reduced over ranks that have unequally many of
them.
"""

from __future__ import annotations

import json
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.check import Answer, Check, Row, answer, reason_of, skipped
from benchmarks.gpu.loops import Loops, Way, loops_of
from benchmarks.inputs.cells import Cell
from embeddings.lookup.sharded import ShardedBags
from tests.helpers.forked import fork_ranks
from trainer.ranks.process_group import Ranks, sum_over_ranks
from trainer.run_config import Config

RANKS = 2
# The second rank has fewer users.
_USERS, _TINY = (288, 200), (4, 2)


def bags(check: Check) -> Answer:
    """Whether row-wise bags need to be padded to equal numbers over NCCL, as they do over gloo, and what
    either costs: two ranks with unequally many bags, padded and as they are.

    Expected: both ways end, with losses within 1e-4 of each other; on one GPU the step is skipped.
    """
    # Not torch.cuda.device_count() in this process alone: the ranks are forks of it.
    if not check.dry and torch.cuda.device_count() < RANKS:
        return skipped(f"it needs {RANKS} GPUs, there is {torch.cuda.device_count()}")
    rows: list[Row] = []
    for padded in (True, False) if check.on_cuda else (True,):
        name = "padded" if padded else "as they are"
        with tempfile.TemporaryDirectory() as folder:
            try:
                codes = fork_ranks(RANKS, lambda ranks: _rank(check, ranks, padded, Path(folder)))  # noqa: B023
                found = [json.loads(file.read_text()) for file in sorted(Path(folder).glob("rank-*.json"))]
                rows.append(
                    {"bags": name, "exit codes": str(codes), **(found[0] if len(found) == RANKS else {})}
                )
            except TimeoutError as error:
                rows.append({"bags": name, "error": reason_of(error)})
    return answer(rows, _different(rows))


def _different(rows: list[Row]) -> list[str]:
    failed = [row["bags"] for row in rows if "loss" not in row]
    if failed or len(rows) < RANKS:
        return failed
    one, other = (row["loss"] for row in rows)
    return ["losses"] if abs(one - other) / abs(one) > 1e-4 else []


def _rank(check: Check, ranks: Ranks, padded: bool, folder: Path) -> None:
    """One rank's steps; what it found goes to a file."""
    users = (_TINY if check.dry else _USERS)[ranks.rank]
    sizes: dict[str, Any] = {"count": check.size(4, 2), "rounds": check.size(3, 1)}
    cell = Cell(items=check.size(4_068_790, 2_000), length=check.size(200, 30), users=users)
    with loops_of(cell, ranks, change=_by_rows, **sizes) as loops:
        if ranks.device.type == "cuda":
            pad(loops.job.sharded.model, padded)
        loss = _loss(loops, ranks)
        found = loops.train_steps(Way("sparse_dist"))
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps({"loss": loss, **found}))


def _by_rows(config: Config) -> Config:
    groups = {
        name: group.model_copy(update={"sharding": ("row_wise",)}) for name, group in config.groups.items()
    }
    return config.model_copy(update={"groups": groups})


def pad(model: nn.Module, padded: bool) -> None:
    """Have row-wise bags padded to equal numbers over ranks, or not; on CUDA the default is not."""
    for module in model.modules():
        if isinstance(module, ShardedBags):
            module._pads = padded


def _loss(loops: Loops, ranks: Ranks) -> float:
    """Over all ranks, of the last of some first steps."""
    last = deque(loops.pipeline(Way("none")).train(loops.steps), maxlen=1)
    return float(sum_over_ranks(last[0][1].total.to(ranks.device)))
