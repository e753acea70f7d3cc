"""Similarities of pre-trained vectors: what they add to a model on the planted log `similar`, and their cost

    tandemrec bench similarity --seeds 1,2,3 --out runs/similarity --page benchmarks/similarity.md

Each seed has a log of its own, and models that start from it: benchmarks/planted/several.toml with small
tables of ids, without and with a feature that compares each candidate with the behaviors. The cost is that of
the reader, on one thread, without any model: seconds for all batches of a log with one similarity less those
without, over candidates, and over pairs of a candidate and a behavior that it is compared with.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Final

import torch

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, rounds, seconds_of
from benchmarks.models import RESULTS, Record, keep, records_of
from benchmarks.planted.experiments.probe import BASE
from pipelines.evaluate import evaluate
from pipelines.synth.synth import VECTORS, synth
from pipelines.train import train
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import is_sequence_log, read_manifest

OF_IDS: Final = (
    "data.history_length=30",
    "model.k=30",
    'groups.attention.features=["item_id"]',
    "train.epochs=4",
)
NONE, SIMPLE = "ids alone", "max, mnse"
MODELS: Final[Mapping[str, Mapping[str, Any]]] = {
    NONE: {},
    SIMPLE: {"statistic": "max"},
    "max, buckets": {"statistic": "max", "encoder": "buckets"},
    "mean, mnse": {"statistic": "mean"},
    "mean of 3 greatest, mnse": {"statistic": "top", "top": 3},
    "histogram": {"statistic": "histogram"},
}
QUALITY = {
    "model": "{model}",
    "AUC": "{auc:.4f} ± {auc_sd:.4f}",
    "logloss": "{logloss:.4f} ± {logloss_sd:.4f}",
    "training, processor s": "{cpu_s:.0f}",
}
COST = {
    "vectors of": "{dim} numbers",
    "behaviors of a request": "{length}",
    "similarity": "{model}",
    "µs a candidate": "{us:.2f}",
    "ns a pair": "{ns:.1f}",
    "batches, without: µs a candidate": "{plain_us:.2f}",
}


def main(words: Sequence[str]) -> None:
    options = Options("similarity", __doc__).measuring(repeats=5)
    options.add_argument("--seeds", default="1,2,3", help="comma-separated")
    options.add_argument("--users", type=int, default=0, help="to train on, 0 = the kind's own number")
    options.add_argument("--out", type=Path, required=True)
    given = options.read(words)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    torch.set_num_threads(1)
    report = Report(given, "Similarities of pre-trained vectors", n=len(seeds))
    logs = {seed: _log(given.out, seed, given.users) for seed in seeds}
    quality = [_quality(name, logs, given.out / "run") for name in MODELS]
    oracle = [read_manifest(log).report["oracle"]["test"] for log in logs.values()]
    report.table(QUALITY, [_row("oracle", oracle, {}), *quality])
    report.line(
        f"Test split of the planted log `similar`, {len(seeds)} seed(s), ± is the standard deviation over "
        "them. Items have some 6 events each, so that ids tell little."
    )
    cost = _costs(given.repeats, logs[seeds[0]])
    report.table(COST, cost)
    report.line("The reader on one thread, with one thread for products; median of the rounds.")
    report.rows = [*quality, *cost]
    by_name = {row["model"]: row for row in quality}
    report.ratios = {"auc_gain": by_name[SIMPLE]["auc"] - by_name[NONE]["auc"]}
    report.show_ratios(4)
    report.close()


def _log(out: Path, seed: int, users: int) -> Path:
    log = (out / (f"similar-{seed}" + (f"-{users}" if users else ""))).absolute()
    if not is_sequence_log(log):
        with redirect_stdout(io.StringIO()):
            synth(log, "similar", seed, users)
    return log


def _overrides(log: Path, similarity: Mapping[str, Any]) -> list[str]:
    features = '["item_id", "near"]' if similarity else '["item_id"]'
    found = [*OF_IDS, f"data.log={log}", f"groups.representation.features={features}"]
    if similarity:
        found += [f"data.vectors.content.file={log / VECTORS}"]
        found += [f"data.similarity.near.{key}={value}" for key, value in _settings(similarity).items()]
    return found


def _settings(similarity: Mapping[str, Any]) -> dict[str, Any]:
    return {"of": "content", "to": "content", **similarity}


def _quality(name: str, logs: Mapping[int, Path], folder: Path) -> Row:
    """A model on each log, measured on its test split; one that was measured before is not trained again."""
    known = [each for each in records_of(folder.parent / RESULTS) if each["model"] == name]
    measured = []
    for seed, log in logs.items():
        done = [each for each in known if each["log"] == log.name]
        measured.append(done[0] if done else _measured(name, seed, log, folder))
    return _row(name, measured, {"cpu_s": fmean(each["cpu_s"] for each in measured)})


def _measured(name: str, seed: int, log: Path, folder: Path) -> Record:
    """Train a model on a log, measure it on its test split, and keep what was measured."""
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*_overrides(log, MODELS[name]), f"train.seed={seed}"]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        spent = seconds_of(partial(train, BASE, folder, overrides))
        entry = evaluate(folder, "test")
    shutil.rmtree(folder)
    values = {key: entry[key] for key in ("auc", "logloss")}
    record = {"model": name, "log": log.name, "cpu_s": spent.cpu, **values}
    keep(folder.parent, record)
    print(f"{name}, seed {seed}: AUC {entry['auc']:.4f} ({spent.cpu:.0f} s)", flush=True)
    return record


def _row(name: str, measured: Sequence[Mapping[str, Any]], more: Mapping[str, Any]) -> Row:
    row: Row = {"model": name, **more}
    for key in ("auc", "logloss"):
        values = [each[key] for each in measured]
        row |= {key: fmean(values), f"{key}_sd": stdev(values) if len(values) > 1 else 0.0}
    return row


def _costs(repeats: int, log: Path) -> list[Row]:
    """Of batches of the planted log, and of as long histories as the log has."""
    rows = []
    for name in (SIMPLE, "mean of 3 greatest, mnse", "histogram"):
        data = {kind: _data(log, MODELS[kind]) for kind in (NONE, name)}
        ways = {kind: partial(_measure, each) for kind, each in data.items()}
        with one_thread():
            taken = rounds(ways, repeats)
        candidates = read_manifest(log).splits["train"].candidates
        plain, whole = (median(each.cpu for each in taken[kind]) for kind in (NONE, name))
        length = data[name].history_length
        spent = (whole - plain) / candidates
        rows.append(
            {
                "model": name,
                "dim": 24,
                "length": length,
                "us": 1e6 * spent,
                "ns": 1e9 * spent / length,
                "plain_us": 1e6 * plain / candidates,
            }
        )
    return rows


def _data(log: Path, similarity: Mapping[str, Any]) -> DataConfig:
    given: dict[str, Any] = {"log": str(log), "history_length": 30, "workers": 0, "prefetch": 0}
    if similarity:
        given["vectors"] = {"content": {"file": str(log / VECTORS)}}
        given["similarity"] = {"near": _settings(similarity)}
    return DataConfig.model_validate(given)


def _measure(data: DataConfig) -> Seconds:
    reader = SequenceLogReader(data, "train", None, seed=1)
    return seconds_of(lambda: [step.batch.candidates for step in reader.steps()])
