"""Encoders of numbers on a planted log whose labels depend on the order of prices and on their last digit

    tandemrec bench encoders --seeds 1,2,3 --out runs/encoders [--page FILE.md]

Each way of giving the price to DARE is trained and evaluated over several seeds, one after the other in this
process: not at all, as a raw number of candidates, as intervals, and as digits in three bases (MNSE).
Intervals have as many weights as digits, in a table that is as wide as the three of the digits together. Then
a step of each is timed beside one without the price, on batches of the log that are held in memory; all ways
in turn.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from benchmarks.harness.loops import trainer_loop
from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, rounds, spread
from benchmarks.models import METRICS, mean, seeds_of
from benchmarks.planted.__main__ import planted_log
from pipelines.evaluate import evaluate
from pipelines.synth.digits import BEHAVIORS
from pipelines.train import train
from trainer.assemble import build_sharded, id_bounds, resolve_groups
from trainer.data.reader import SequenceLogReader, Step
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config

PRESET = Path("configs/dare.toml")
GROUPS = ("attention", "representation")
DIM = 8
STEPS = 8
COST = {
    "price": "{name}",
    "ids a behavior": "{ids:.1f}",
    "bytes a behavior, batch": "{batch:.0f}",
    "bytes a behavior, log": "{log:.2f}",
    "n": "{n}",
    "CPU ms a step": "{cpu_ms:.2f}",
    "min-max": "{min:.2f}-{max:.2f}",
}


class Way(NamedTuple):
    """One way of giving the price to the model: the planted log, and the width of each feature's table."""

    kind: str
    dims: dict[str, int]


WAYS = {
    "none": Way("digits", {"category_id": DIM}),
    "number": Way("digits_number", {"category_id": DIM}),
    "buckets": Way("digits", {"category_id": DIM, "price_band": 3 * DIM}),
    "mnse": Way("digits", {"category_id": DIM, "price": DIM}),
}


def overrides_of(way: Way) -> list[str]:
    """The keys of the config that a way sets."""
    dims = ", ".join(f"{name} = {dim}" for name, dim in way.dims.items())
    names = ", ".join(f'"{name}"' for name in way.dims)
    keys = [f"data.history_length={BEHAVIORS}", f"model.k={BEHAVIORS}"]
    for group in GROUPS:
        keys += [f"groups.{group}.features=[{names}]", f"groups.{group}.dim={{{dims}}}"]
    return keys


def run_way(name: str, settings: Sequence[str], seed: int, out: Path) -> Row:
    """Train and evaluate one model; what its test split says."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-{seed}-", dir=out))
    with redirect_stdout(io.StringIO()):
        train(PRESET, folder, [*settings, f"train.seed={seed}"])
        evaluate(folder, "test")
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["test"]
    print(f"{name}, seed {seed}: test AUC {found['auc']:.4f}", flush=True)
    return {"way": name, "seed": seed, **{metric: found[metric] for metric in METRICS}}


def quality_rows(configs: dict[str, Config], records: Sequence[Row], oracle: Any) -> list[list[str]]:
    """Oracle and ways, with mean and deviation over seeds."""
    rows = [["oracle", "", "", *(f"{oracle['test'][name]:.4f}" for name in METRICS)]]
    for name, config in configs.items():
        same = [record for record in records if record["way"] == name]
        cells = [mean([record[metric] for record in same]) for metric in METRICS]
        rows.append([name, f"{weights_of(config):,}", str(len(same)), *cells])
    return rows


def weights_of(config: Config) -> int:
    """Weights of all tables of a model."""
    groups = resolve_groups(config, read_manifest(config.data.log))
    return sum(table.rows * table.dim for group in groups.values() for table in group.tables)


def cost_rows(configs: dict[str, Config], repeats: int, report: Report) -> list[Row]:
    """What a step takes, and how many ids and bytes a behavior has, for each way."""
    ways: dict[str, Callable[[], Seconds]] = {}
    rows: dict[str, Row] = {}
    with process_group() as ranks, tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            steps = read_steps(config)
            ways[name] = step_way(config, steps, ranks, Path(folder))
            rows[name] = {"name": name, **sizes_of(steps), "log": log_bytes(config)}
        seconds = {name: [each.cpu for each in all_] for name, all_ in rounds(ways, repeats).items()}
    for name, each in seconds.items():
        rows[name] |= spread([1000 * value / STEPS for value in each], "cpu_ms")
        rows[name] |= {"n": len(each)}
    report.table(COST, list(rows.values()))
    for name in list(rows)[1:]:
        report.ratio(f"step_{name}_to_none", seconds[name], seconds["none"])
    return list(rows.values())


def read_steps(config: Config) -> list[Step]:
    """The first steps of the train split."""
    groups = resolve_groups(config, read_manifest(config.data.log))
    reader = SequenceLogReader(config.data, "train", id_bounds(groups, config), seed=1)
    return [step for step, _ in zip(reader.steps(), range(STEPS), strict=False)]


def step_way(config: Config, steps: Sequence[Step], ranks: Ranks, folder: Path) -> Callable[[], Seconds]:
    """Trains all steps."""
    model = build_sharded(config, read_manifest(config.data.log), ranks).model
    return partial(trainer_loop, config, model, steps, ranks, folder)


def sizes_of(steps: Sequence[Step]) -> dict[str, float]:
    """Ids and bytes of a bag of all features together: an int64 an id, and an int32 a bag and feature."""
    bags = sum(step.features.stride() for step in steps)
    ids = sum(step.features.values().numel() for step in steps)
    lengths = sum(step.features.lengths().numel() for step in steps)
    return {"ids": ids / bags, "batch": (8 * ids + 4 * lengths) / bags}


def log_bytes(config: Config) -> float:
    """Compressed bytes of a behavior's own features in the files of the train split."""
    split, size = read_manifest(config.data.log).splits["train"], 0
    named = load_named(config)
    for entry in split.files:
        footer = pq.ParquetFile(config.data.log / entry.path).metadata
        for group in range(footer.num_row_groups):
            columns = footer.row_group(group)
            for at in range(columns.num_columns):
                column = columns.column(at)
                name = column.path_in_schema.split(".")[0]
                size += column.total_compressed_size if name in named else 0
    return size / split.behaviors


def load_named(config: Config) -> set[str]:
    """The columns of the features that the config's groups name."""
    return {f"history_{name}" for group in config.groups.values() for name in group.features}


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("encoders", __doc__).measuring(repeats=5)
    options.overriding()
    options.add_argument("--seeds", default="1,2,3", help="comma-separated")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--log-seed", type=int, default=7)
    options.add_argument("--users", type=int, default=0, help="of the planted log; 0 = its own number")
    given = options.read(words)
    report = Report(given, "Encoders of numbers", seed=given.log_seed)
    given.out.mkdir(parents=True, exist_ok=True)
    settings, configs = dict[str, list[str]](), dict[str, Config]()
    for name, way in WAYS.items():
        log = planted_log(given.out, way.kind, given.log_seed, given.users)
        settings[name] = [*overrides_of(way), f"data.log={log}", *given.overrides]
        configs[name] = load_config(PRESET, settings[name])
    for seed in seeds_of(given):
        report.rows += [run_way(name, keys, seed, given.out) for name, keys in settings.items()]
    oracle = read_manifest(configs["mnse"].data.log).report["oracle"]
    head = ["price", "weights in tables", "seeds", "test AUC", "GAUC", "logloss"]
    report.cells(head, quality_rows(configs, report.rows, oracle))
    report.rows += cost_rows(configs, given.repeats, report)
    report.close()
