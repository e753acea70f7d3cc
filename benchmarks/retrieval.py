"""What a run's search keeps, held against the mutual information of behaviors and responses.

    python -m benchmarks.retrieval --run RUN [--run RUN ...] --out FILE.md [--category FEATURE] [--every N]

Ground truth: `benchmarks.information`, counted on the whole training split, once for exact places and once
for places pooled to powers of two. Runs whose folders differ in seed and digest alone (`dare-17-...`,
`dare-18-...`, as `benchmarks.models` names them) share a line.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import rankdata

from benchmarks.information import Floats, Ints, Shown, Truth, count_truths, read_shown, window_ids
from benchmarks.models import spread
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import read_manifest
from trainer.model.frame import TwoStageModel
from trainer.model.windows import first_ids
from trainer.run_config import Config
from trainer.run_folder import RunFolder

ENOUGH = 700  # candidates of a target category in the training split, as in DARE's code
MOST_ROWS = 1_000  # categories: a table has rows x rows x L cells
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Ranked:
    """A batch as a search sees it, newest first.

    Attributes:
        target: [C], category; window: [C, X], categories, -1 = nothing.
        score: [C, X], -inf where there is nothing; order: [C, K], columns that a search keeps, best first.
    """

    target: Ints
    window: Ints
    score: Floats
    order: Ints


@dataclass(frozen=True)
class Quality:
    """Of each candidate: NDCG@K, how many of the K best it keeps, Spearman's rank correlation of score and
    gain over the window."""

    ndcg: Floats
    hits: Floats
    correlation: Floats


def ranked(model: TwoStageModel, batch: RequestBatch, feature: str) -> Ranked:
    """What the main branch keeps of candidates whose window holds more than K behaviors.

    Raises:
        SystemExit: the model has several heads or branches, or searches no plain windows.
    """
    found = model.retrieve(batch)
    branch = model.branches["main"]
    if len(found) > 1 or branch.scorer is None or branch.scorer.heads > 1 or branch.settings.clusters:
        raise SystemExit("retrieval is measured of models with one branch and one head")
    if batch.retrieval is not None:
        raise SystemExit("retrieval is measured of models that search the whole window, not data.search")
    main, k = found["main"], branch.settings.k
    with torch.no_grad():
        score = branch.scorer.over_windows(main.vectors, main.windows)[:, 0].numpy().astype(np.float64)
    kept = main.selection
    column = np.where(kept.mask.numpy(), kept.marks.position.numpy() - 1, 0)
    best = np.where(kept.mask.numpy(), np.take_along_axis(score, column, axis=1), -np.inf)
    order = np.take_along_axis(column, np.argsort(-best, axis=1, kind="stable")[:, :k], axis=1)
    ids_N, ids_C = first_ids(batch, feature)
    window = window_ids(batch, ids_N, model.branches.history_length)[batch.candidate_request.numpy()]
    wide = (window >= 0).sum(axis=1) > k
    return Ranked(ids_C.numpy()[wide], window[wide], score[wide], order[wide])


def references(seen: Ranked, rng: np.random.Generator) -> dict[str, Ranked]:
    """Searches that learn nothing, over the same windows."""
    real = seen.window >= 0
    place = np.broadcast_to(np.arange(real.shape[1]), real.shape)
    same = (seen.window == seen.target[:, None]) & (seen.target > 0)[:, None]
    scores = {
        "newest first": -place,
        "same category, newest first": np.where(same, real.shape[1], 0) - place,
        "random": rng.random(real.shape),
    }
    return {name: _by_score(seen, np.where(real, score, -np.inf)) for name, score in scores.items()}


def _by_score(seen: Ranked, score: Floats) -> Ranked:
    order = np.argsort(-score, axis=1, kind="stable")[:, : seen.order.shape[1]]
    return Ranked(seen.target, seen.window, score, order)


def quality(found: Ranked, gain: Floats) -> Quality:
    """`gain` [C, X] of the behaviors; columns without one do not count."""
    real, k = found.window >= 0, found.order.shape[1]
    discount = 1 / np.log2(np.arange(k) + 2)
    ideal = np.argsort(-np.where(real, gain, -np.inf), axis=1, kind="stable")[:, :k]
    dcg, best = (
        (np.take_along_axis(gain, order, axis=1) * discount).sum(axis=1) for order in (found.order, ideal)
    )
    kept, wanted = (_marked(order, gain.shape) for order in (found.order, ideal))
    with np.errstate(invalid="ignore"):
        ndcg = dcg / best  # NaN where no behavior tells anything
    return Quality(ndcg, (kept & wanted).sum(axis=1).astype(float), _spearman(found.score, gain, real))


def _marked(order: Ints, shape: tuple[int, ...]) -> Bools:
    marked = np.zeros(shape, dtype=bool)
    np.put_along_axis(marked, order, True, axis=1)
    return marked


def _spearman(score: Floats, gain: Floats, real: Bools) -> Floats:
    """Of each row, over its real columns; equal values share their mean rank. NaN where all are equal."""
    deviations = []
    for values in (score, gain):
        # Columns without a behavior tie below all others, which shifts the others' ranks alike.
        rank = np.where(real, rankdata(np.where(real, values, -np.inf), axis=1), 0.0)
        mean = rank.sum(axis=1, keepdims=True) / real.sum(axis=1, keepdims=True)
        deviations.append(np.where(real, rank - mean, 0.0))
    a, b = deviations
    with np.errstate(invalid="ignore"):
        return np.asarray((a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))


def measure_run(
    folder: Path, truths: Mapping[str, Truth], feature: str, every: int, beside: bool
) -> tuple[dict[str, dict[str, list[Quality]]], int]:
    """(search -> truth -> qualities of the batches, candidates counted) of a run on the test split.

    Its own search is named "", and with `beside` come the references.
    """
    from pipelines.start import open_split
    from trainer.checkpoint.restore import restore
    from trainer.ranks.process_group import process_group

    rng = np.random.default_rng(0)
    measured: dict[str, dict[str, list[Quality]]] = {}
    counted = 0
    with process_group() as ranks:
        restored = restore(RunFolder(folder), ranks)
        model = getattr(restored.sharded.model, "module", restored.sharded.model)
        reader = open_split(restored.config, "test", restored.rows, ranks)
        with closing(reader.steps()) as steps:
            for number, step in enumerate(steps):
                if number % every:
                    continue
                seen = popular(ranked(model, step.batch, feature), truths["exact"])
                counted += seen.target.size
                for name, found in {"": seen, **(references(seen, rng) if beside else {})}.items():
                    for place, truth in truths.items():
                        part = quality(found, truth.of(found.target, found.window))
                        measured.setdefault(name, {}).setdefault(place, []).append(part)
    return measured, counted


def popular(seen: Ranked, truth: Truth) -> Ranked:
    """The candidates whose category the training split showed often enough."""
    often = truth.shown[seen.target] >= ENOUGH
    return Ranked(seen.target[often], seen.window[often], seen.score[often], seen.order[often])


def means(parts: Sequence[Quality]) -> dict[str, float]:
    return {
        name: float(np.nanmean(np.concatenate([getattr(part, name) for part in parts])))
        for name in ("ndcg", "hits", "correlation")
    }


def lines_of(runs: Mapping[str, Sequence[Mapping[str, Mapping[str, float]]]], k: int) -> Iterator[str]:
    """A table: label -> one entry a seed -> truth -> means."""
    truths = ("exact", "pooled")
    head = [f"{what}, {truth}" for truth in truths for what in (f"NDCG@{k}", "hits", "rank correlation")]
    yield "| search | seeds | " + " | ".join(head) + " |"
    yield "|---|--:|" + "--:|" * len(head)
    for label, seeds in runs.items():
        cells = [
            spread([each[truth][name] for each in seeds], digits)
            for truth in truths
            for name, digits in (("ndcg", 4), ("hits", 2), ("correlation", 3))
        ]
        yield f"| {label} | {len(seeds)} | " + " | ".join(cells) + " |"


def label_of(folder: Path) -> str:
    """A run folder's name without seed and digest."""
    return re.sub(r"-\d+-[0-9a-f]{10}$", "", folder.name)


def read_training(config: Config, feature: str, rows: int) -> Shown:
    """The training split of a run's log."""
    length = config.data.history_length
    data = DataConfig(log=config.data.log, history_length=length, order="stored", verify=False)
    return read_shown(SequenceLogReader(data, "train", None), feature, length, rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--run", action="append", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--category", default="category_id", help="feature that classes behaviors")
    options.add_argument("--every", type=int, default=1, help="measure every n-th step of the test split")
    given = options.parse_args()
    configs = [RunFolder(run).read_config() for run in given.run]
    same = {(config.data.log, config.data.history_length, config.model.k) for config in configs}
    if len(same) > 1:
        options.error("the runs differ in log, history_length or k")
    rows = read_manifest(configs[0].data.log).features[given.category].rows
    if rows > MOST_ROWS:
        options.error(
            f"{given.category} has {rows:,} ids; all pairs are counted, so take one of {MOST_ROWS:,}"
        )
    split = read_training(configs[0], given.category, rows)
    truths = count_truths(split, rows)
    print(f"counted {int(split.shown.sum()):,} candidates", flush=True)
    runs: dict[str, list[dict[str, dict[str, float]]]] = {}
    for run in given.run:
        measured, counted = measure_run(run, truths, given.category, given.every, beside=not runs)
        for name, found in measured.items():
            seeds = runs.setdefault(name or label_of(run), [])
            seeds.append({truth: means(parts) for truth, parts in found.items()})
        print(f"{run.name}: NDCG {runs[label_of(run)][-1]['exact']['ndcg']:.4f}, {counted:,}", flush=True)
    table = lines_of(runs, configs[0].model.k)
    shown = f"    python -m benchmarks.retrieval {shlex.join(sys.argv[1:])}"
    text = [*table, "", f"{counted:,} test candidates a run.", "", shown]
    given.out.write_text("\n".join(["# Retrieval", "", *text]) + "\n", encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
