"""Several passes over one log: what each schedule does to AUC, GAUC and logloss, over several seeds

    tandemrec bench schedules --log LOG --config configs/dare.toml --seeds 17,18,19 --out runs/schedules \
        [--schedule tables ...] [--set KEY=VALUE ...] [--page FILE.md]

A schedule is the one before it and one phase more. A run goes on from a copy of the run folder of the one
before, so that all schedules of a seed share their first pass to the bit. Every run is measured on the
validation and the test split. What is finished is one line of OUT/results.jsonl, and is not made again. Runs
are made one after the other, with one thread.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean, stdev
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
    mean,
    results,
    seeds_of,
)
from benchmarks.rules import toml_of


class Schedule(NamedTuple):
    """One phase after others.

    Attributes:
        before: name of the schedule that it goes on from; empty: none.
        phase: its entry of [[phases]], but for the name and `passes = 1`.
        told: what it does, for the table.
    """

    before: str
    phase: Mapping[str, Any]
    told: str


_TABLES = {"reset": ["tables"]}
_SEARCH_KEPT = {"reset": ["groups.representation"]}
_SEARCH_FROZEN = {**_SEARCH_KEPT, "freeze": ["groups.attention"]}
_TENTH = {"attention": 0.02, "representation": 0.02}
SCHEDULES = {
    "one": Schedule("", {}, "one pass"),
    "again": Schedule("one", {}, "a second pass"),
    "again3": Schedule("again", {}, "a third pass"),
    "tables": Schedule("one", _TABLES, "second pass: all tables begin anew (MEDA)"),
    "tables3": Schedule("tables", _TABLES, "third pass: all tables begin anew (MEDA)"),
    "representation": Schedule("one", _SEARCH_KEPT, "second pass: new representation tables"),
    "representation3": Schedule("representation", _SEARCH_KEPT, "third pass: the same once more"),
    "attention": Schedule("one", {"reset": ["groups.attention"]}, "second pass: new attention tables"),
    "searched": Schedule("one", _SEARCH_FROZEN, "second pass: new representation, attention tables frozen"),
    "searched3": Schedule("searched", _SEARCH_FROZEN, "third pass: the same once more"),
    "fixed_tables": Schedule("one", {"freeze": ["tables"]}, "second pass: all tables frozen"),
    "fixed_attention": Schedule(
        "one", {"freeze": ["groups.attention"]}, "second pass: attention tables frozen"
    ),
    "fixed_representation": Schedule(
        "one", {"freeze": ["groups.representation"]}, "second pass: representation tables frozen"
    ),
    "dense": Schedule("one", {"reset": ["dense"]}, "second pass: all dense weights begin anew"),
    "all_but_search": Schedule(
        "one",
        {"reset": ["groups.representation", "dense"]},
        "second pass: new representation tables and dense weights",
    ),
    "low": Schedule(
        "one",
        {"learning_rate": 0.0003, "table_learning_rates": _TENTH},
        "second pass: a tenth of all learning rates",
    ),
}


def lineage(name: str) -> list[str]:
    """A schedule and those before it, the first one first."""
    before = SCHEDULES[name].before
    return [*(lineage(before) if before else []), name]


def text_of(name: str, preset: Path) -> str:
    """The configuration of a schedule, as TOML."""
    lines = [f"extends = {json.dumps(str(preset.absolute()))}"]
    for number, each in enumerate(lineage(name), 1):
        lines += ["[[phases]]", f'name = "pass{number}"', "passes = 1"]
        lines += [f"{key} = {toml_of(value)}" for key, value in SCHEDULES[each].phase.items()]
    return "\n".join(lines) + "\n"


def run(name: str, seed: int, given: Any) -> Record:
    """Make the run of a schedule, and measure it; its parent's is there."""
    from pipelines.evaluate import evaluate
    from pipelines.train import train

    out, before = given.out, SCHEDULES[name].before
    config, folder = out / f"{name}.toml", out / f"{name}-{seed}"
    config.write_text(text_of(name, given.config), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    if before:
        shutil.copytree(out / f"{before}-{seed}", folder)
        (folder / "summary.json").unlink()
    with redirect_stdout(io.StringIO()):
        settings = (f"data.log={given.log.absolute()}", f"train.seed={seed}", "checkpoint.every_steps=0")
        train(config, folder, [*given.overrides, *settings])
        # A run that a signal has stopped has no summary. What validation says is in it already.
        if (folder / "summary.json").exists():
            evaluate(folder, "test")
        else:
            raise SystemExit(f"{folder.name} was stopped; the same command begins it again")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [line for line in lines if line["split"] == "train"]
    # The last quarter of its last pass: what the model says of candidates just before it learns them.
    losses = [line["loss"] for line in trained if line["phase"] == trained[-1]["phase"]]
    kept = {key: summary[key] for key in (*SPLITS, "samples", "steps", "cpu_s", "versions")}
    return {
        "name": key_of(name, seed, given),
        "schedule": name,
        "seed": seed,
        "threads": 1,
        "loss": fmean(losses[-max(1, len(losses) // 4) :]),
        **kept,
    }


def key_of(name: str, seed: int, given: Any) -> str:
    """What a finished run is known by: its settings as given, and the log."""
    from trainer.checkpoint.compatible import log_fingerprint
    from trainer.log.schema import read_manifest

    log = log_fingerprint(read_manifest(given.log))
    all_given = json.dumps([text_of(name, given.config), sorted(given.overrides), log], sort_keys=True)
    return f"{name}-{seed}-{hashlib.sha256(all_given.encode()).hexdigest()[:10]}"


def cells_of(records: Sequence[Record], of_one: Mapping[int, Record]) -> list[list[str]]:
    """A line for each schedule: its metrics, and by how much it is above one pass of the same seed."""
    lines = []
    for name in dict.fromkeys(record["schedule"] for record in records):
        same = [record for record in records if record["schedule"] == name]
        cells = [SCHEDULES[name].told, str(len(same)), mean([record["loss"] for record in same])]
        cells += [mean([float(record["validation"]["logloss"]) for record in same])]
        cells += [mean([float(record["test"][metric]) for record in same]) for metric in METRICS]
        gains = [
            float(record["test"]["auc"]) - float(of_one[record["seed"]]["test"]["auc"]) for record in same
        ]
        gain = f"{fmean(gains):+.4f}" + (f" ± {stdev(gains):.4f}" if len(gains) > 1 else "")
        lines.append([*cells, "" if name == "one" else gain])
    return lines


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("schedules", __doc__)
    options.add_argument("--config", type=Path, required=True, help="the preset")
    options.add_argument("--log", type=Path, required=True)
    options.add_argument("--seeds", default="17", help="comma-separated")
    options.add_argument(
        "--schedule", action="append", choices=SCHEDULES, help="repeatable; those before it are made too"
    )
    options.add_argument("--out", type=Path, required=True)
    options.overriding()
    given = options.read(words)
    given.out.mkdir(parents=True, exist_ok=True)
    wanted = dict.fromkeys(each for name in given.schedule or SCHEDULES for each in lineage(name))
    report = Report(given, "Schedules", n=len(seeds_of(given)))
    for seed in seeds_of(given):
        for name in wanted:
            key = key_of(name, seed, given)
            if key not in (there := results(given.out)):
                record = run(name, seed, given)
                keep(given.out, record)
                there[key] = record
                print(f"{name}, seed {seed}: test AUC {record['test']['auc']:.4f}", flush=True)
            report.rows.append(there[key])
    of_one = {row["seed"]: row for row in report.rows if row["schedule"] == "one"}
    head = ["schedule", "seeds", "training loss", "validation logloss", "test AUC", "GAUC", "logloss"]
    order = {name: place for place, name in enumerate(wanted)}
    report.rows.sort(key=lambda row: order[row["schedule"]])
    report.cells([*head, "AUC above one pass"], cells_of(report.rows, of_one))
    report.line(environment_line(report.rows, 1))
    report.close()
