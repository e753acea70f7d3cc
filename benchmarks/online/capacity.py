"""Tables of a fixed capacity beside tables that hold every id, and admission at the second sighting

    tandemrec bench online capacity --log LOG --config configs/dare.toml --out OUT \
        [--case CASE ...] [--feature item_id] [--seeds 17,18] [--set KEY=VALUE ...] [--page FILE.md]

Every case trains the same preset on the same log and is measured on the validation and the test split. Its
tables of the feature have so many rows as its rules say; `static` has one row for each id of the log. What is
finished is one line of OUT/results.jsonl, and is not made again. Runs are made one after the other, with one
thread.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.harness.timing import one_thread
from benchmarks.models import (
    METRICS,
    SPLITS,
    Record,
    environment_line,
    keep,
    make_job,
    mean,
    results,
    seeds_of,
)
from benchmarks.rules import toml_of


class Case(NamedTuple):
    """How a feature's ids get rows.

    Attributes:
        told: for the table; rules: of [ids.<feature>] but for the capacity; none: static tables.
        share: of the ids of the log, that is the capacity.
    """

    told: str
    rules: Mapping[str, Any] | None
    share: float = 1.0


# Each bucket has rows of its own, so that a capacity of all ids would leave some without a row.
_ROOM = 1.5
_CANDIDATES = {"counts": "candidates"}
_SECOND = {"admission": "count", "admit_count": 2}
CASES = {
    "static": Case("static tables", None),
    "all": Case("living ids, room for all", {}, _ROOM),
    "second": Case("a row at the second sighting as a candidate", {**_SECOND, **_CANDIDATES}, _ROOM),
    "lru": Case("capacity 10 %, evicts by lru", {"eviction": "lru"}, 0.1),
    "lfu": Case("capacity 10 %, evicts by lfu", {"eviction": "lfu"}, 0.1),
    "lfu_decay": Case("capacity 10 %, evicts by lfu_decay", {"eviction": "lfu_decay"}, 0.1),
    "never": Case("capacity 10 %, evicts never", {"eviction": "never"}, 0.1),
    "second_lfu": Case(
        "capacity 10 %, second sighting, lfu", {**_SECOND, **_CANDIDATES, "eviction": "lfu"}, 0.1
    ),
}


def settings_of(case: Case, feature: str, ids: int) -> list[str]:
    """The overrides of a case; `ids`: of the feature in the log."""
    if case.rules is None:
        return []
    rules = {"capacity": round(case.share * ids), **case.rules}
    return [f"ids.{feature}.{key}={toml_of(value)}" for key, value in rules.items()]


def run(case: str, seed: int, given: Any, ids: int) -> Record:
    """Train and measure one case."""
    from pipelines.evaluate import evaluate
    from pipelines.train import train

    overrides = [*given.overrides, *settings_of(CASES[case], given.feature, ids)]
    job = make_job(given.config, given.log.absolute(), overrides, seed)
    if job.name in (there := results(given.out)):
        return there[job.name]
    folder = given.out / job.name
    shutil.rmtree(folder, ignore_errors=True)
    with redirect_stdout(io.StringIO()):
        train(given.config, folder, [*job.overrides, "checkpoint.every_steps=0"])
        if not (folder / "summary.json").exists():
            raise SystemExit(f"{folder.name} was stopped; the same command begins it again")
        for split in SPLITS:
            evaluate(folder, split)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    kept = {key: summary[key] for key in (*SPLITS, "samples", "steps", "cpu_s", "versions")}
    record = {"name": job.name, "case": case, "seed": seed, "threads": 1, **kept}
    record["ids"] = counts_of(folder, given.feature)
    record["rows"] = record["ids"].get("live", ids)
    keep(given.out, record)
    print(f"{case}, seed {seed}: test AUC {record['test']['auc']:.4f}", flush=True)
    return record


def counts_of(folder: Path, feature: str) -> dict[str, int]:
    """What became of the feature's ids, summed over the run; `live` at its end. {} with static tables."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [entry for line in lines if (entry := json.loads(line).get(f"ids.{feature}"))]
    if not found:
        return {}
    return {key: sum(each[key] for each in found) for key in found[0]} | {"live": found[-1]["live"]}


def cells_of(records: Sequence[Record]) -> list[list[str]]:
    """A line a case: rows in use, what became of ids, metrics, and AUC above static tables."""
    static = {record["seed"]: record for record in records if record["case"] == "static"}
    lines = []
    for case in dict.fromkeys(record["case"] for record in records):
        same = [record for record in records if record["case"] == case]
        ids = same[0]["ids"]
        seen = sum(ids.get(key, 0) for key in ("known", "admitted", "rejected", "crowded"))
        cells = [CASES[case].told, str(len(same)), f"{fmean(record['rows'] for record in same):,.0f}"]
        cells += [f"{ids['known'] / seen:.1%}" if seen else "", f"{ids['evicted']:,}" if ids else ""]
        cells += [mean([float(record["test"][metric]) for record in same]) for metric in METRICS]
        gains = [
            float(record["test"]["auc"]) - float(static[record["seed"]]["test"]["auc"])
            for record in same
            if record["seed"] in static
        ]
        cells.append(f"{fmean(gains):+.4f}" if gains and case != "static" else "")
        lines.append([*cells, f"{fmean(record['cpu_s'] for record in same):,.0f}"])
    return lines


@one_thread()
def main(words: Sequence[str]) -> None:
    from trainer.log.schema import read_manifest

    options = Options("online capacity", __doc__)
    options.add_argument("--config", type=Path, required=True, help="the preset")
    options.add_argument("--log", type=Path, required=True)
    options.add_argument("--feature", default="item_id")
    options.add_argument("--seeds", default="17", help="comma-separated")
    options.add_argument("--case", action="append", choices=CASES, help="repeatable; without it all")
    options.add_argument("--out", type=Path, required=True)
    options.overriding()
    given = options.read(words)
    given.out.mkdir(parents=True, exist_ok=True)
    ids = read_manifest(given.log).features[given.feature].rows - 1
    report = Report(given, "Capacity", n=len(seeds_of(given)))
    report.rows = [run(case, seed, given, ids) for case in given.case or CASES for seed in seeds_of(given)]
    head = [
        "rows of the feature's tables",
        "seeds",
        "ids with a row at the end",
        "steps' ids that had a row",
    ]
    head += ["evicted", "test AUC", "GAUC", "logloss", "AUC above static", "CPU s"]
    report.cells(head, cells_of(report.rows))
    report.line(environment_line(report.rows, 1))
    report.close()
