"""Several sets of tables, beside one set that is as wide as all of them together

Made-up steps of the trainer's DARE (item and category, L behaviors, K kept), held in memory, with the head
`experts`: an expert for each set, and their mean (Multi-Embedding). "look-up" is what the representation's
tables cost: exchange of ids, look-up of kept behaviors and candidates, exchange of vectors, and the same
backward with the update of the rows; on two ranks (gloo) also with a feature's ids sent for each of its
tables, which is TorchRec's way. "step" is a whole step of the trainer. All ways run in turn; a ratio is the
median of the rounds' ratios of processor seconds, of both ranks together.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from benchmarks.harness.collectives import CollectiveCounter
from benchmarks.harness.loops import trainer_loop
from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, rounds, seconds_of, spread
from benchmarks.harness.two_ranks import add_rank_of, start_ranks
from benchmarks.inputs.cells import Cell, config_of
from benchmarks.inputs.synthetic import Draws, as_batch
from embeddings.groups import TableGroup
from embeddings.lookup.compile import make_collection
from embeddings.lookup.jagged import select_bags
from embeddings.lookup.sharded import Exchange
from embeddings.lookup.sharding import attach_optimizer, shard
from embeddings.plan.planner import make_plan
from embeddings.plan.request import PlanRequest
from trainer.assemble import build_sharded, cluster_of, resolve_groups
from trainer.config.toml import Settings, load_settings
from trainer.data.cursor import Cursor
from trainer.data.reader import Step
from trainer.log.schema import LogManifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config

GROUP = "representation"
COLUMNS = {
    "": "{name}",
    "n": "{n}",
    "CPU ms": "{cpu_ms:.2f}",
    "min-max": "{min:.2f}-{max:.2f}",
    "ids MB": "{ids_mb:.3f}",
    "vectors and gradients MB": "{floats_mb:.3f}",
}


# Sets, and whether ids are sent once -> what is measured.
Ways = dict[tuple[int, bool], Callable[[], Seconds]]


class SetsBench(Settings):
    """The settings of the steps.

    Attributes:
        seed: of ids, labels and first weights; steps: of one measurement.
        items, length, users: rows of the item table, L, users of a step.
        widths: of a feature's tables, all sets together; sets: how many there are.
        sharding: of the tables of both groups, on two ranks.
        model: more keys of the section [model]; the head has an expert for each set, whose mean it takes.
    """

    seed: int = Field(7, ge=0)
    items: PositiveInt = 1_000_000
    length: PositiveInt = 200
    users: PositiveInt = 36
    widths: tuple[PositiveInt, ...] = (16, 64)
    sets: tuple[PositiveInt, ...] = (1, 4)
    steps: PositiveInt = 4
    sharding: tuple[str, ...] = ("table_wise", "row_wise")
    model: dict[str, Any] = Field(default_factory=lambda: {"head": "experts"})


class Lookup(nn.Module):
    """One group's collection alone."""

    def __init__(self, group: TableGroup) -> None:
        super().__init__()
        self.collections = nn.ModuleDict({group.name: make_collection(group, torch.device("meta"))})
        attach_optimizer(self.collections[group.name], group.optimizer)

    def forward(self, bags: KeyedJaggedTensor) -> KeyedTensor:
        (collection,) = self.collections.values()
        found: KeyedTensor = collection(bags)
        return found


def config_with_sets(settings: SetsBench, width: int, sets: int, sharding: str = "") -> Config:
    """The config of a cell whose representation has so many sets, `width` wide together for each feature."""
    cell = Cell(items=settings.items, length=settings.length, dim=width, users=settings.users)
    tree = config_of(cell).model_dump(mode="json")
    tree["groups"][GROUP] |= {"dim": width // sets, "sets": sets}
    if sharding:
        tree["groups"][GROUP]["sharding"] = [sharding]
    tree["model"] |= settings.model
    return Config.model_validate(tree)


def steps_of(settings: SetsBench, config: Config, rank: int = 0) -> tuple[list[Step], LogManifest]:
    """Steps of blocks as the trainer has them, other ones for each rank."""
    cell = Cell(items=settings.items, length=settings.length, users=settings.users)
    draws, manifest = Draws(cell.shape, settings.seed + rank), cell.shape.manifest()
    batches = [
        as_batch(draws.step(), manifest, config.data, cell.shape.requests) for _ in range(settings.steps)
    ]
    return [Step(batch, True, Cursor()) for batch in batches], manifest


def kept_bags(steps: Sequence[Step], k: int, seed: int) -> list[KeyedJaggedTensor]:
    """Bags of the candidates, and of behaviors as if a search kept any K for each candidate."""
    rng, found = torch.Generator().manual_seed(seed), []
    for step in steps:
        n, c = step.batch.behaviors, step.batch.candidates
        kept = torch.randint(0, n, (c * k,), generator=rng).unique()
        found.append(select_bags(step.batch.features, torch.cat([kept, n + torch.arange(c)]), one_id=True))
    return found


def lookup_way(
    config: Config, manifest: LogManifest, bags: Sequence[KeyedJaggedTensor], ranks: Ranks, once: bool = True
) -> Callable[[], Seconds]:
    """Looks all bags up and updates their rows."""
    group = resolve_groups(config, manifest)[GROUP]
    model = Lookup(group)
    plan = make_plan(PlanRequest(model, (group,), cluster_of(ranks))).plan
    exchange = Exchange(once=once)
    sharded = shard(model, {GROUP: group}, plan, ranks.device, config.train.seed, exchange=exchange)

    def work() -> None:
        for each in bags:
            sharded(each).values().sum().backward()

    return partial(seconds_of, work)


def step_way(
    config: Config, manifest: LogManifest, steps: Sequence[Step], ranks: Ranks, folder: Path
) -> Callable[[], Seconds]:
    """Trains all steps."""
    model = build_sharded(config, manifest, ranks).model
    return partial(trainer_loop, config, model, steps, ranks, folder)


def measure_one_rank(settings: SetsBench, repeats: int, report: Report) -> None:
    """Add look-ups and whole steps of one rank."""
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        for width in settings.widths:
            for what in ("look-up", "step"):
                ways: Ways = {}
                for sets in settings.sets:
                    config = config_with_sets(settings, width, sets)
                    steps, manifest = steps_of(settings, config)
                    if what == "step":
                        ways[sets, True] = step_way(config, manifest, steps, ranks, Path(folder))
                    else:
                        bags = kept_bags(steps, config.model.k, settings.seed)
                        ways[sets, True] = lookup_way(config, manifest, bags, ranks)
                seconds = {way: [each.cpu for each in all_] for way, all_ in rounds(ways, repeats).items()}
                _add(report, f"1 rank, width {width}, {what}", settings, seconds, {})


def run_rank(settings: SetsBench, repeats: int, folder: Path) -> None:
    """Be one of two ranks; the first writes what both took and sent."""
    found: list[dict[str, Any]] = []
    with process_group(300) as ranks, tempfile.TemporaryDirectory() as own:
        for sharding in settings.sharding:
            for width in settings.widths:
                case = f"2 ranks, {sharding}, width {width}"
                lookups: Ways = {}
                steps: Ways = {}
                sent: dict[tuple[int, bool], list[int]] = {}
                for sets in settings.sets:
                    config = config_with_sets(settings, width, sets, sharding)
                    held, manifest = steps_of(settings, config, ranks.rank)
                    steps[sets, True] = step_way(config, manifest, held, ranks, Path(own))
                    for once in (True, False) if sets > 1 else (True,):
                        bags = kept_bags(held, config.model.k, settings.seed)
                        lookups[sets, once] = lookup_way(config, manifest, bags, ranks, once)
                        with CollectiveCounter() as exchanged:
                            lookups[sets, once]()
                        sent[sets, once] = [exchanged.bytes_of(floats=floats) for floats in (False, True)]
                for what, ways in (("look-up", lookups), ("step", steps)):
                    for way, each in rounds(ways, repeats).items():
                        cpu = _of_both([seconds.cpu for seconds in each])
                        bytes_ = _of_both(sent[way]) if what == "look-up" else []
                        found.append({"case": f"{case}, {what}", "way": way, "cpu": cpu, "bytes": bytes_})
    if ranks.speaks:
        (folder / "found.json").write_text(json.dumps(found))


def _of_both(numbers: Sequence[float]) -> list[float]:
    """The sums over all ranks."""
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    sums: list[float] = total.tolist()
    return sums


def _add(
    report: Report,
    case: str,
    settings: SetsBench,
    seconds: dict[tuple[int, bool], list[float]],
    sent: dict[tuple[int, bool], list[float]],
) -> None:
    rows: list[Row] = []
    for (sets, once), each in seconds.items():
        name = f"{sets} set{'s' if sets > 1 else ''}{'' if once else ', ids for each table'}"
        row: Row = {"case": case, "name": name}
        row |= spread([1000 * value / settings.steps for value in each], "cpu_ms")
        if sent.get((sets, once)):
            ids, floats = (value / settings.steps / 1e6 for value in sent[sets, once])
            row |= {"ids_mb": ids, "floats_mb": floats}
        rows.append(row)
    columns = (
        COLUMNS if any(sent.values()) else {key: form for key, form in COLUMNS.items() if "MB" not in key}
    )
    report.table({case: "{name}"} | {key: form for key, form in columns.items() if key}, rows)
    report.rows += rows
    one = seconds[settings.sets[0], True]
    for (sets, once), each in seconds.items():
        if sets != settings.sets[0]:
            shown = f"{sets}_sets{'' if once else '_ids_for_each_table'}_to_{settings.sets[0]}"
            report.ratio(f"{case}: {shown}", each, one, shown=shown)
    report.line()


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("sets", __doc__).measuring(config=False)
    add_rank_of(options)
    given = options.read(words)
    settings = load_settings(SetsBench, given.config, given.overrides)
    if given.rank_of:
        run_rank(settings, given.repeats, given.rank_of)
        return
    report = Report(given, "Sets", seed=settings.seed)
    report.facts = {"settings": settings.model_dump(mode="json"), "repeats": given.repeats}
    measure_one_rank(settings, given.repeats, report)
    with tempfile.TemporaryDirectory() as folder:
        start_ranks("sets", Path(folder), words, 1800)
        found = json.loads((Path(folder) / "found.json").read_text())
    for case in dict.fromkeys(each["case"] for each in found):
        of_case = {(each["way"][0], each["way"][1]): each for each in found if each["case"] == case}
        seconds = {way: each["cpu"] for way, each in of_case.items()}
        _add(report, case, settings, seconds, {way: each["bytes"] for way, each in of_case.items()})
    report.close()
