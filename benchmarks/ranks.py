"""Many ranks without their processes: how even steps and tables are, and what a rank sends

Steps: the reader's own functions cut and deal blocks of made-up users, whose histories have a heavy tail
(log-normal, median 100, at most 20,000 behaviors; 18 requests each on average). Tables: TorchRec's planner
places those of the config, as `tandemrec plan` does. Nothing is measured: the figures follow from the seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from pydantic import Field, PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.inputs.cells import config_with
from benchmarks.inputs.synthetic import Shape
from embeddings.plan.memory import gigabytes, memory_of_ranks
from embeddings.plan.planner import offline_plan
from embeddings.plan.request import Cluster
from embeddings.plan.traffic import traffic
from trainer.assemble import build_trainable, plan_request
from trainer.config.sections import DataConfig
from trainer.config.tables import TableConfig
from trainer.config.toml import Settings, load_settings
from trainer.data.blocks import Block, cut_blocks, deal, decoders_needed, decoders_of, most_decoders
from trainer.data.rows import PlanRows
from trainer.step_size import StepSize

_STEPS = {
    "ranks": "{ranks}",
    "candidates a rank": "{candidates:,}",
    "blocks a rank": "{blocks:.1f}",
    "data.sharding": "{sharding}",
    "ranks a row group": "{each}",
    "largest / mean": "{mean:.2f}",
    "95 % of steps": "{most:.2f}",
    "worst": "{worst:.2f}",
}
_TABLES = {
    "ranks": "{ranks}",
    "fullest rank": "{fullest}",
    "memory, largest / mean": "{memory:.2f}",
    "work, largest / mean": "{work:.2f}",
    "fastest: memory": "{before:.2f}",
    "sent a rank and step": "{sent}",
    "lookups ms": "{time:.2f}",
    "sharding": "{kinds}",
}


class RanksBench(Settings):
    """The settings of this benchmark.

    Attributes:
        seed: of the users and the shuffle; ranks: world sizes, 8 ranks a node.
        candidates: of a step, for each rank; length: L; row_groups, users: of a window, and of a row group.
        rows: of the item table; dims: widths of attention and representation.
        sharding: of the item tables; empty = what suits GPUs. hbm_gb: of a GPU.
    """

    seed: int = Field(7, ge=0)
    ranks: tuple[PositiveInt, ...] = (8, 16, 24, 32, 64)
    candidates: tuple[PositiveInt, ...] = (256, 1024, 4096)
    length: PositiveInt = 500
    row_groups: PositiveInt = 64
    users: PositiveInt = 400
    rows: PositiveInt = 2_000_000_000
    dims: tuple[PositiveInt, PositiveInt] = (16, 64)
    hbm_gb: PositiveInt = 192


def main(words: Sequence[str]) -> None:
    given = Options("ranks", __doc__).measuring(config=False).read(words)
    settings = load_settings(RanksBench, given.config, given.overrides)
    report = Report(given, "Many ranks", seed=settings.seed)
    report.line("behaviors and candidates of a rank in a step")
    plans = users(settings)
    steps = [
        steps_of(settings, plans, ranks, candidates, sharding)
        for candidates in settings.candidates
        for ranks in settings.ranks
        for sharding in ("steps", "one rank a row group", "row_groups", "auto on GPUs")
    ]
    report.table(_STEPS, steps)
    report.line()
    report.line(f"tables of {settings.rows:,} rows, {settings.dims[0]} and {settings.dims[1]} columns")
    tables = [
        tables_of(settings, ranks, kind)
        for ranks in settings.ranks
        for kind in ("", "grid_shard", "row_wise")
        if ranks > 8 or kind != "grid_shard"
    ]
    report.table(_TABLES, tables)
    report.rows = [*steps, *tables]
    report.close()


def users(settings: RanksBench) -> list[PlanRows]:
    """The lengths of a window of row groups."""
    rng, plans = np.random.default_rng(settings.seed), []
    for _ in range(settings.row_groups):
        lengths = np.minimum(rng.lognormal(np.log(100), 1.5, settings.users), 20_000).astype(int) + 1
        requests = np.minimum(rng.geometric(1 / 18, settings.users), lengths)
        ends = [np.sort(rng.integers(0, n + 1, r)) for n, r in zip(lengths, requests, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(requests)])
        plans.append(PlanRows(offsets, np.concatenate(ends), rng.integers(1, 20, offsets[-1])))
    return plans


def steps_of(
    settings: RanksBench, plans: Sequence[PlanRows], ranks: int, candidates: int, sharding: str
) -> Row:
    """How even the steps of one window are."""
    config = DataConfig(history_length=settings.length, batch_candidates=candidates * ranks)
    # A row group is known by its number: nothing is decoded.
    blocks = [
        block
        for number, plan in enumerate(plans)
        for block in cut_blocks(plan, (), cast(Any, number), config)
    ]
    needed = decoders_needed(blocks, config, ranks)
    each = {"steps": 0, "one rank a row group": 1, "row_groups": needed or most_decoders(ranks)}.get(
        sharding, needed
    )
    owners = decoders_of([plan.cost for plan in plans], ranks, each) if each else [()] * len(plans)
    order = np.random.default_rng([settings.seed, 0, 0]).permutation(len(blocks))
    uneven, count = [], 0
    for step in _cut([blocks[place] for place in order.tolist()], config.batch_candidates):
        costs = [block.cost for block in step]
        taken = deal(costs, ranks, [owners[cast(int, block.rows)] for block in step])
        loads = np.bincount(taken, weights=costs, minlength=ranks)
        uneven.append(float(loads.max() / loads.mean()))
        count += len(step)
    return {
        "name": f"{ranks} ranks, {candidates:,} candidates, {sharding}",
        "ranks": ranks,
        "candidates": candidates,
        "blocks": count / len(uneven) / ranks,
        "sharding": sharding,
        "each": each or "all",
        "mean": float(np.mean(uneven)),
        "most": float(np.quantile(uneven, 0.95)),
        "worst": max(uneven),
    }


def _cut(blocks: Sequence[Block], candidates: int) -> Iterator[list[Block]]:
    """Whole steps, as the reader closes them."""
    step: list[Block] = []
    total = 0
    for block in blocks:
        if total >= candidates:
            yield step
            step, total = [], 0
        step.append(block)
        total += block.candidates


def tables_of(settings: RanksBench, ranks: int, kind: str) -> Row:
    """How even the tables lie, and what their lookups send; `kind`: of the item tables."""
    groups = ["attention", "representation"]
    config = config_with({"k": 20}, groups, settings.dims[0], settings.length)
    changed = {
        name: config.groups[name].model_copy(update={"dim": dim})
        for name, dim in zip(groups, settings.dims, strict=True)
    }
    config = config.model_copy(
        update={"groups": changed, "tables": {"item_id": TableConfig(rows=settings.rows)}}
    )
    if kind:
        rules = {f"plan.tables.{name}__item_id.sharding": [kind] for name in groups}
        plan = config.plan.model_validate(
            {"tables": {key.split(".")[2]: {"sharding": value} for key, value in rules.items()}}
        )
        config = config.model_copy(update={"plan": plan})
    manifest = Shape(1000, 100, settings.length, 1).manifest()
    candidates = 1024 * ranks
    size = StepSize(20 * candidates, candidates, candidates // 10, ((1000, 50),), "given")
    cluster = Cluster("cuda", ranks, min(ranks, 8), settings.hbm_gb * 10**9, 128 * 10**9)
    request = plan_request(
        config, manifest, build_trainable(config, manifest, torch.device("meta")), cluster, size
    )
    found = offline_plan(request)
    held = [m.total for m in memory_of_ranks(found.options, found.tables, ranks, "cuda")]
    work = np.zeros(ranks)
    sent = 0.0
    for option in found.options:
        for shard in option.shards:
            work[shard.rank] += shard.perf.total
        table, cut = found.tables[option.name], {"column_wise": 1, "grid_shard": cluster.local_world_size}
        shards = len(option.shards) // cut.get(option.sharding_type, len(option.shards))
        sent += traffic(
            (table.rows, table.dim), option.sharding_type, shards, request.lookups[option.name], ranks,
            cluster.local_world_size, table.pooled,
        ).total  # fmt: skip
    kinds = {option.sharding_type for option in found.options if option.name.endswith("item_id")}
    return {
        "name": f"{ranks} ranks, tables, {kind or 'as planned'}",
        "ranks": ranks,
        "fullest": gigabytes(max(held)),
        "memory": max(held) * ranks / sum(held),
        "work": float(work.max() / work.mean()),
        "before": found.fastest.fullest / found.taken.fullest * max(held) * ranks / sum(held),
        "sent": gigabytes(sent / ranks),
        "sent_bytes": sent / ranks,
        "time": found.taken.time,
        "kinds": f"{kind} (asked for)" if kind else ", ".join(sorted(kinds)),
    }
