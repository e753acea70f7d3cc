"""The behaviors that a run's search keeps, held against the mutual information of behaviors and responses

    tandemrec bench retrieval --run RUN [--run RUN ...] --out FILE.md [--category FEATURE] [--every N]

The ground truth (`benchmarks.retrieval.information`) is counted on the whole training split, once for exact
places and once for places pooled to powers of two. Runs whose folders differ in seed and digest alone
(`dare-17-...`, `dare-18-...`, as `tandemrec bench models` names them) share a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.models import mean
from benchmarks.retrieval.information import Impressions, Truth, count_truths, read_impressions
from benchmarks.retrieval.ranking import Quality, Ranking, quality, rank, references
from pipelines.start import open_split
from trainer.checkpoint.restore import restore
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_config import Config
from trainer.run_folder import RunFolder

ENOUGH = 700  # candidates of a target category in the training split, as in DARE's code
MOST_ROWS = 1_000  # categories: a table has rows x rows x L cells
MEANS = {"ndcg": ("NDCG@{k}", 4), "hits": ("hits", 2), "correlation": ("rank correlation", 3)}


def measure_run(
    folder: Path, truths: Mapping[str, Truth], feature: str, every: int, beside: bool
) -> tuple[dict[str, dict[str, list[Quality]]], int]:
    """Measure a run on the test split: (search -> truth -> quality of each batch, candidates counted).

    The run's own search is named "". With `beside` the references are measured too.
    """
    rng = np.random.default_rng(0)
    measured: dict[str, dict[str, list[Quality]]] = {}
    counted = 0
    with process_group() as ranks:
        restored = restore(RunFolder(folder), ranks)
        model = getattr(restored.sharded.model, "module", restored.sharded.model)
        reader = open_split(restored.config, "test", restored.rows, ranks, finders=restored.finders)
        with closing(reader.steps()) as steps:
            for number, step in enumerate(steps):
                if number % every:
                    continue
                ranking = popular(rank(model, step.batch, feature), truths["exact"])
                counted += ranking.target.size
                for name, each in {"": ranking, **(references(ranking, rng) if beside else {})}.items():
                    for place, truth in truths.items():
                        part = quality(each, truth.of(each.target, each.window))
                        measured.setdefault(name, {}).setdefault(place, []).append(part)
    return measured, counted


def popular(ranking: Ranking, truth: Truth) -> Ranking:
    """The candidates whose category the training split showed often enough."""
    often = truth.shown[ranking.target] >= ENOUGH
    return Ranking(ranking.target[often], ranking.window[often], ranking.score[often], ranking.order[often])


def means(parts: Sequence[Quality]) -> dict[str, float]:
    return {
        name: float(np.nanmean(np.concatenate([getattr(part, name) for part in parts])))
        for name in ("ndcg", "hits", "correlation")
    }


def label_of(folder: Path) -> str:
    """A run folder's name without seed and digest."""
    return re.sub(r"-\d+-[0-9a-f]{10}$", "", folder.name)


def read_training(config: Config, feature: str, rows: int) -> Impressions:
    """The training split of a run's log."""
    length = config.data.history_length
    data = DataConfig(log=config.data.log, history_length=length, order="stored", verify=False)
    return read_impressions(SequenceLogReader(data, "train", None), feature, length, rows)


def main(words: Sequence[str]) -> None:
    options = Options("retrieval", __doc__)
    options.add_argument("--run", action="append", type=Path, required=True)
    options.add_argument("--out", dest="page", type=Path, required=True, help="the same as --page")
    options.add_argument("--category", default="category_id", help="feature that classes behaviors")
    options.add_argument("--every", type=int, default=1, help="measure every n-th step of the test split")
    given = options.read(words)
    configs = [RunFolder(run).read_config() for run in given.run]
    same = {(config.data.log, config.data.history_length, config.model.k) for config in configs}
    if len(same) > 1:
        options.error("the runs differ in log, history_length or k")
    rows = read_manifest(configs[0].data.log).features[given.category].rows
    if rows > MOST_ROWS:
        options.error(
            f"{given.category} has {rows:,} ids; all pairs are counted, so take one of {MOST_ROWS:,}"
        )
    report = Report(given, "Retrieval", n=len(given.run))
    split = read_training(configs[0], given.category, rows)
    truths = count_truths(split, rows)
    print(f"counted {int(split.shown.sum()):,} candidates", flush=True)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {}
    for run in given.run:
        measured, counted = measure_run(run, truths, given.category, given.every, beside=not runs)
        for name, by_truth in measured.items():
            label = name or label_of(run)
            seed = {truth: means(parts) for truth, parts in by_truth.items()}
            runs.setdefault(label, []).append(seed)
            report.rows.append({"search": label, "run": run.name, **seed})
        print(f"{run.name}: NDCG {runs[label_of(run)][-1]['exact']['ndcg']:.4f}, {counted:,}", flush=True)
    shown = [(t, name, *MEANS[name]) for t in ("exact", "pooled") for name in MEANS]
    report.cells(
        ["search", "seeds", *(f"{what.format(k=configs[0].model.k)}, {t}" for t, _, what, _ in shown)],
        [
            [
                label,
                str(len(seeds)),
                *(mean([seed[t][name] for seed in seeds], digits) for t, name, _, digits in shown),
            ]
            for label, seeds in runs.items()
        ],
    )
    report.line(f"{counted:,} test candidates a run.")
    report.close()
