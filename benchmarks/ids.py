"""Living ids: a step beside the same step with static tables, maps over a long stream, and single look-ups

Step: DARE over made-up Zipf ids, on one rank and on two (gloo, one thread each). Every way trains the same
steps in turn, each step once: with static tables, with a row for every id, and with a tenth of the rows, so
that ids come and go at every step. Batches lie in memory, so that reading hides nothing. The first three
rounds, which see most ids for the first time, are not counted.
Stream: the map alone over `events` sightings whose popular ids change, with a tenth of the distinct ids as
capacity; each rule in a process of its own. A hit is a sighting whose id had a row before its step.
Look-up: the processor time that one step's sightings take at the end of that stream.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, rounds, seconds_of, spread
from benchmarks.harness.two_ranks import RANKS, add_rank_of, start_ranks
from benchmarks.inputs.cells import Cell, config_of
from benchmarks.inputs.synthetic import Draws, as_batch
from embeddings.ids.bucket_map import Counts, Int64s, Sightings
from embeddings.ids.new_rows import NewRows
from embeddings.ids.rules import IdRules
from embeddings.ids.stage import IdStage
from trainer.assemble import build_sharded
from trainer.checkpoint.delta import row_parts
from trainer.config.toml import Settings, load_settings
from trainer.data.cursor import Cursor
from trainer.data.reader import Step
from trainer.log.schema import LogManifest
from trainer.loop.living import LivingIds
from trainer.loop.pipeline import Pipeline
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, make_optimizer

STATIC, ROOMY, TIGHT = "static tables", "living ids, a row for each", "living ids, a tenth of the rows"
RULES: dict[str, dict[str, Any]] = {
    "all, lru": {},
    "all, lfu": {"eviction": "lfu"},
    "all, lfu_decay": {"eviction": "lfu_decay", "half_life": 86_400},
    "count 2 exact, lru": {"admission": "count"},
    "count 2 sketch, lru": {"admission": "count", "counter": "sketch"},
    "chance 0.1, lru": {"admission": "chance"},
    "all, never": {"eviction": "never"},
}
STEP_COLUMNS = {
    "": "{name}",
    "n": "{n}",
    "CPU ms a step": "{cpu_ms:.1f}",
    "min-max": "{min:.1f}-{max:.1f}",
    "new rows a step": "{new:,.0f}",
}
STREAM_COLUMNS = {
    "rules": "{rules}",
    "hits %": "{hits:.1f}",
    "last tenth %": "{late_hits:.1f}",
    "admitted": "{admitted:,}",
    "evicted": "{evicted:,}",
    "bytes a row": "{bytes_a_row:.0f}",
    "grown MB": "{grown_mb:.0f}",
}
LOOKUP_COLUMNS = {
    "rules": "{rules}",
    "different ids": "{distinct:,.0f}",
    "new": "{new:,.0f}",
    "count them, ms": "{merge_ms:.2f}",
    "update, ms": "{take_ms:.2f}",
    "look up, ms": "{find_ms:.2f}",
}
_TENTHS = 10
_WARM = 3
_DAY = 86_400


class IdsBench(Settings):
    """The settings of this benchmark.

    Attributes:
        seed: of everything drawn; items, users, length: of the steps; steps: of one measurement.
        events, occurrences: sightings of the stream, and of one of its steps; distinct: its different ids.
        days: that the stream lasts, in which half of the ids take the places of the others.
    """

    seed: int = Field(7, ge=0)
    items: PositiveInt = 500_000
    users: PositiveInt = 36
    length: PositiveInt = 200
    steps: PositiveInt = 10
    events: PositiveInt = 20_000_000
    occurrences: PositiveInt = 50_000
    distinct: PositiveInt = 2_000_000
    days: PositiveInt = 30


class Way:
    """One model with its own maps, which goes on from round to round.

    Attributes:
        new: rows that were given to new ids, of each step.
    """

    def __init__(
        self,
        config: Config,
        manifest: LogManifest,
        held: Sequence[Step],
        ranks: Ranks,
        folder: Path,
        each: int,
    ) -> None:
        model = build_sharded(config, manifest, ranks).model
        optimizer = make_optimizer(model, config.train)
        self._living, self.new = LivingIds.of(config, ranks, False, manifest.features), list[int]()
        step = TrainStep(config, model, optimizer, ranks.world_size, Guard(ranks, folder))
        if self._living is not None:
            tensors = {"model": model.state_dict(), "optim": optimizer.state_dict()}
            parts = {key: [p.tensor for p in of.values()] for key, of in row_parts(tensors).items()}
            step.new_rows = NewRows(model.module.lookups.groups.values(), config.train.seed, parts)
        self._pipeline = Pipeline("none", model, step, ranks.device)
        self._rounds = iter([held[begin : begin + each] for begin in range(0, len(held), each)])

    def round(self) -> Seconds:
        """Train the next steps."""
        steps = next(self._rounds)
        self.new.clear()
        return seconds_of(lambda: deque(self._pipeline.train(self._looked_up(steps)), maxlen=0))

    def _looked_up(self, steps: Sequence[Step]) -> Iterator[Step]:
        if self._living is None:
            yield from steps
            return
        with self._living.steps(iter(steps)) as mapped:
            for step in mapped:
                self.new.append(sum(rows.size for rows in step.new_rows.values()))
                yield step
                self._living.trained()


def steps_of(settings: IdsBench, ranks: Ranks, repeats: int, folder: Path) -> dict[str, Way]:
    """All ways over the same steps, of which this rank has its part."""
    cell = Cell(items=settings.items, length=settings.length, users=settings.users)
    config, manifest = config_of(cell), cell.shape.manifest()
    draws = Draws(cell.shape, settings.seed)
    drawn = [draws.step() for _ in range(settings.steps * (repeats + _WARM) * ranks.world_size)]
    held = [
        Step(as_batch(rows, manifest, config.data, cell.shape.requests), True, Cursor())
        for rows in drawn[ranks.rank :: ranks.world_size]
    ]
    rows = {name: info.rows for name, info in manifest.features.items()}
    ids: dict[str, dict[str, int]] = {
        STATIC: {},
        ROOMY: rows,
        TIGHT: {name: max(64, each // 10) for name, each in rows.items()},
    }
    return {
        name: Way(with_ids(config, capacities), manifest, held, ranks, folder, settings.steps)
        for name, capacities in ids.items()
    }


def with_ids(config: Config, capacities: Mapping[str, int]) -> Config:
    """The same config, where the ids of these features come and go."""
    ids = {name: {"capacity": capacity} for name, capacity in capacities.items()}
    return Config.model_validate({**config.model_dump(exclude_unset=True), "ids": ids})


def measure_steps(settings: IdsBench, repeats: int) -> list[Row]:
    """Processor milliseconds of every way, of all ranks together; `each` holds those of every round."""
    with process_group(300) as ranks, tempfile.TemporaryDirectory() as folder:
        ways = steps_of(settings, ranks, repeats, Path(folder))
        taken = rounds({name: way.round for name, way in ways.items()}, repeats, _WARM)
        found = []
        for name, each in taken.items():
            total = torch.tensor(
                [1e3 * seconds.cpu / settings.steps for seconds in each], dtype=torch.float64
            )
            dist.all_reduce(total)
            new = float(np.mean(ways[name].new or [0]))
            found.append({"ranks": ranks.world_size, "name": name, "each": total.tolist(), "new": new})
        return found


class Stream:
    """Sightings by Zipf's law, where each id gives its popularity to a new one at some time of the stream."""

    def __init__(self, settings: IdsBench) -> None:
        self._settings, self._rng = settings, np.random.default_rng(settings.seed)
        weights = np.arange(1, settings.distinct // 2 + 1, dtype=np.float64) ** -0.9
        self._reach = np.cumsum(weights / weights.sum())

    def steps(self) -> Iterator[tuple[Int64s, Int64s]]:
        """Ids and times of each step."""
        size, total = self._settings.occurrences, self._settings.events
        half = self._settings.distinct // 2
        for begin in range(0, total - size + 1, size):
            seen = (begin + np.arange(size)) / total
            rank = np.searchsorted(self._reach, self._rng.random(size)).clip(max=half - 1)
            # When it does has nothing to do with how popular it is.
            place = (rank * 7_919) % half
            item = np.where(place / half < seen, place + half, place)
            yield item * 0x5DEECE66D - (1 << 40), (seen * self._settings.days * _DAY).astype(np.int64)


class Sample(NamedTuple):
    """A step of the stream: processor milliseconds, numbers of ids, and the share of hits."""

    merge_ms: float
    take_ms: float
    find_ms: float
    distinct: float
    new: float
    hits: float


def sample_of(stage: IdStage, ids: Int64s, times: Int64s) -> Sample:
    """Let a map have a step of the stream."""
    rules = stage.rules["item"]
    started = time.process_time()
    seen, place = Sightings.merged(ids, np.ones_like(ids), times)
    merged = time.process_time()
    taken = stage.take({"item": seen}, int(times[-1]))
    done = time.process_time()
    stage.look_up({"item": seen.ids})
    found = time.process_time()
    rows, new = taken.rows["item"], taken.new_rows["item"]
    hits = float(((rows >= rules.shared_rows) & ~np.isin(rows, new))[place].mean())
    times_ms = 1e3 * (merged - started), 1e3 * (done - merged), 1e3 * (found - done)
    return Sample(*times_ms, seen.ids.size, new.size, hits)


@one_thread()
def measure_rules(name: str, settings: IdsBench) -> Row:
    """One set of rules over the stream, in this process."""
    rules = IdRules(settings.distinct // 10, **RULES[name])
    stage, steps = IdStage({"item": rules}), settings.events // settings.occurrences
    samples, resident = list[Sample](), list[float]()
    for ids, times in Stream(settings).steps():
        samples.append(sample_of(stage, ids, times))
        if len(samples) * _TENTHS // steps > len(resident):
            resident.append(_resident() / 1e6)
    late = samples[-max(1, steps // _TENTHS) :]
    middle = Sample(*(median(column) for column in zip(*late, strict=True)))
    counts: Counts = stage.maps["item"].counts
    state = sum(array.nbytes for array in stage.maps["item"].state().values())
    return {
        "rules": name,
        **middle._asdict(),
        "hits": 100 * float(np.mean([each.hits for each in samples])),
        "late_hits": 100 * float(np.mean([each.hits for each in late])),
        "admitted": counts.admitted,
        "evicted": counts.evicted,
        "bytes_a_row": state / (rules.rows - rules.shared_rows),
        "resident_mb": resident,
        "grown_mb": resident[-1] - resident[0],
    }


def _resident() -> int:
    """Bytes of memory of this process."""
    words = Path("/proc/self/statm").read_text(encoding="utf-8").split()
    return int(words[1]) * 4096


def show_steps(report: Report, found: Sequence[Row]) -> None:
    """The tables of one rank and of two, and how much longer a step takes."""
    for ranks in (1, RANKS):
        of = [each for each in found if each["ranks"] == ranks]
        rows = [{**each, **spread(each["each"], "cpu_ms")} for each in of]
        report.table(
            {f"{ranks} rank{'s' * (ranks > 1)}": "{name}"} | {k: v for k, v in STEP_COLUMNS.items() if k},
            rows,
        )
        report.rows += rows
        for each in of[1:]:
            label = f"{ranks} rank{'s' * (ranks > 1)}: {each['name']} over {STATIC}"
            report.ratio(label, each["each"], of[0]["each"])
        report.line()


def show_rules(report: Report, rows: Sequence[Row]) -> None:
    """The tables of the stream."""
    report.table(STREAM_COLUMNS, rows)
    report.line("Resident MB after each tenth of the stream:")
    head = ["rules", *(f"{10 * tenth} %" for tenth in range(1, _TENTHS + 1))]
    report.cells(head, [[row["rules"], *(f"{mb:,.0f}" for mb in row["resident_mb"])] for row in rows])
    report.line()
    report.table(LOOKUP_COLUMNS, rows)
    report.rows += rows


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("ids", __doc__).measuring(config=False)
    options.add_argument("--only", choices=("steps", "stream"), help="measure this part alone")
    add_rank_of(options)
    given = options.read(words)
    settings = load_settings(IdsBench, given.config, given.overrides)
    if given.rank_of:
        found = measure_steps(settings, given.repeats)
        # Both ranks have the same sums.
        (given.rank_of / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return
    report = Report(given, "Living ids", seed=settings.seed)
    report.facts = {"settings": settings.model_dump(mode="json")}
    if given.only != "stream":
        found = measure_steps(settings, given.repeats)
        with tempfile.TemporaryDirectory() as folder:
            start_ranks("ids", Path(folder), words, 1800)
            found += json.loads((Path(folder) / "found.json").read_text(encoding="utf-8"))
        show_steps(report, found)
    if given.only != "steps":
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as apart:
            show_rules(report, [*apart.map(partial(measure_rules, settings=settings), RULES)])
    report.close()
