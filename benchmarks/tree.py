"""A gradient-boosted tree on hand-made counts of a sequence log, which a model of embeddings must beat

    tandemrec bench tree --log runs/demo/log [--trials 6] [--history-length 500] [--share 0.5]

For each candidate and each of item_id and the taxonomy levels: how many behaviors of the request's window
have the candidate's id, the same decayed with a half-life of 30 days, and the seconds since the newest of
them. Besides, the item's popularity before the validation period (where the log has a vocabulary), the number
of visible behaviors and the seconds since the newest one. Nothing at or after the request's time enters.
scikit-learn's HistGradientBoostingClassifier, trained on the train split alone. Its settings and the number
of its trees are chosen by the AUC of the validation split, among `--trials` settings of a fixed grid; the
test split is read once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.ensemble import HistGradientBoostingClassifier

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.harness.timing import seconds_of
from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.hard_search import hierarchical_search
from trainer.data.reader import SequenceLogReader
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.schema import read_manifest
from trainer.quality.baselines import item_counts
from trainer.quality.metrics import group_keys, measure
from trainer.quality.ranking import auc

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.float64]
HALF_LIFE = 30.0 * 86_400
ITERATIONS = 300
# Trees after which the validation split is looked at.
_EVERY = 10


@dataclass(frozen=True)
class TreeSettings:
    """What is chosen by the validation split, by scikit-learn's names."""

    learning_rate: float = 0.1
    max_leaf_nodes: int = 63
    min_samples_leaf: int = 100

    def told(self) -> str:
        """In words."""
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


GRID = tuple(TreeSettings(*each) for each in product((0.05, 0.1, 0.2), (31, 63, 127), (20, 100, 500)))


def settings_to_try(trials: int, seed: int) -> list[TreeSettings]:
    """The default settings, and others of the grid in an order that the seed decides."""
    default, others = TreeSettings(), [each for each in GRID if each != TreeSettings()]
    order = np.random.default_rng(seed).permutation(len(others))
    return [default, *(others[place] for place in order)][:trials]


@dataclass(frozen=True)
class Samples:
    """Candidates of a split: features float32 [C, X], labels [C, T] of the tasks, and their names, [C] each.

    A label is NaN where it was not observed.
    """

    features: Floats
    labels: Floats
    tasks: tuple[str, ...]
    user: Ints
    request: Ints
    candidate: Ints

    def of_task(self, task: int) -> Samples:
        """The candidates that have a label of a task, with this label alone, [C, 1]."""
        seen = ~np.isnan(self.labels[:, task])
        names = (each[seen] for each in (self.user, self.request, self.candidate))
        return Samples(self.features[seen], self.labels[seen][:, [task]], (self.tasks[task],), *names)


def levels_of(log: Path) -> list[str]:
    """The levels with one id a behavior and candidate: the taxonomy, coarse to fine, and the item."""
    manifest = read_manifest(log)
    named = list(dict.fromkeys([*manifest.taxonomy, "item_id"]))
    return [n for n in named if not manifest.features[n].multi and manifest.features[n].side == "both"]


def read_samples(log: Path, split: str, length: int, share: float = 1.0, seed: int = 17) -> Samples:
    """The features of a split.

    Args:
        length: behaviors of a request's window, 0 = all.
        share: of the users' rows, drawn by `seed`.
    """
    levels, manifest = levels_of(log), read_manifest(log)
    wanted = dict.fromkeys([*levels, "item_id"])
    columns = Columns.of(manifest, {name: manifest.features[name].rows for name in wanted})
    popularity, rng = _popularity(log), np.random.default_rng(seed)
    parts, labels, keys = [], [], []
    for place in SequenceLogReader(DataConfig(log=log), split, None).row_groups:
        rows = read_rows(place.file, place.row_group, columns)
        chosen = np.nonzero(rng.random(rows.user_id.size) < share)[0]
        for row in chosen.tolist():
            part = _row_features(rows, row, levels, length, popularity)
            candidates, key = _candidates(rows, row)
            parts.append(part)
            labels.append(rows.labels[candidates])
            keys.append(key)
    if not parts:
        raise DataError(f"a share of {share:g} of {split} holds no user; raise --share", file=log)
    user, request, candidate = np.concatenate(keys).T
    tasks = tuple(manifest.tasks)
    return Samples(np.concatenate(parts), np.concatenate(labels), tasks, user, request, candidate)


def _popularity(log: Path) -> Counts | None:
    """How often each item occurred before validation; None where nobody has counted that."""
    items = read_manifest(log).features["item_id"]
    if items.raw:
        return None
    try:
        return item_counts(log, np.arange(items.rows))
    except DataError:
        return None


def _candidates(rows: UserRows, row: int) -> tuple[slice, Ints]:
    """A row's candidates, and the (user, request, place in the request) of each."""
    first, last = int(rows.request_offsets[row]), int(rows.request_offsets[row + 1])
    part = slice(int(rows.candidate_offsets[first]), int(rows.candidate_offsets[last]))
    starts, sizes = rows.candidate_offsets[first:last], np.diff(rows.candidate_offsets[first : last + 1])
    request = np.repeat(rows.request_id[first:last], sizes)
    place = np.arange(part.start, part.stop) - np.repeat(starts, sizes)
    return part, np.stack([np.full(request.size, rows.user_id[row]), request, place], axis=1)


def _row_features(
    rows: UserRows, row: int, levels: Sequence[str], length: int, popularity: Counts | None
) -> Floats:
    """The features of a row's candidates, [C, X]."""
    first, last = int(rows.request_offsets[row]), int(rows.request_offsets[row + 1])
    history = slice(int(rows.history_offsets[row]), int(rows.history_offsets[row + 1]))
    part, _ = _candidates(rows, row)
    end, asked = rows.history_end[first:last], rows.request_time[first:last]
    start = np.maximum(end - length, 0) if length else np.zeros_like(end)
    of = np.repeat(np.arange(last - first), np.diff(rows.candidate_offsets[first : last + 1]))
    when = rows.history_time[history]
    found: list[npt.NDArray[np.generic]] = []
    for level in levels:
        held = rows.history[level].values[history].astype(np.int64)
        wanted = rows.candidates[level].values[part].astype(np.int64)
        hits = hierarchical_search(held[None], when, wanted[None], of, start, end, asked, 1, HALF_LIFE)
        found += [hits.matches[:, 0], hits.decayed[:, 0], _since(asked[of], when, hits.index[:, 0])]
    newest = np.where(end > start, end - 1, -1)
    if popularity is not None:
        found.append(popularity[rows.candidates["item_id"].values[part]])
    found += [(end - start)[of], _since(asked, when, newest)[of]]
    return np.stack(found, axis=1).astype(np.float32)


def _since(asked: Ints, when: Ints, index: Ints) -> npt.NDArray[np.float64]:
    """Seconds from behavior `index` to the request; NaN, which a tree treats apart, where it is -1."""
    if not when.size:
        return np.full(index.shape, np.nan)
    return np.where(index >= 0, asked - when[index.clip(min=0)], np.nan)


def train_tree(
    samples: Samples, settings: TreeSettings, iterations: int, seed: int
) -> HistGradientBoostingClassifier:
    """A tree on samples of one task. A label y between 0 and 1 is a positive of weight y and a negative of
    weight 1 - y."""
    tree = HistGradientBoostingClassifier(
        **asdict(settings), max_iter=iterations, early_stopping=False, random_state=seed
    )
    features, label = samples.features, samples.labels[:, 0]
    # scikit-learn finds no bins where nothing is known; a constant says as little.
    features = np.where(np.isnan(features).all(axis=0), np.float32(0), features)
    if ((label == 0) | (label == 1)).all():
        return tree.fit(features, label)
    weight = np.concatenate([label, 1 - label])
    both = np.concatenate([np.ones_like(label), np.zeros_like(label)])
    used = weight > 0
    return tree.fit(np.concatenate([features, features])[used], both[used], weight[used])


@dataclass(frozen=True)
class Trial:
    """One setting: its AUC on the validation split, with so many trees; the tree has more of them."""

    settings: TreeSettings
    auc: float
    iterations: int
    tree: HistGradientBoostingClassifier


def tried(
    train: Samples, validation: Samples, to_try: Iterable[TreeSettings], iterations: int, seed: int
) -> Iterator[Trial]:
    """Train a tree of each setting. Of AUCs without a meaning the last one counts as 0."""
    for settings in to_try:
        tree = train_tree(train, settings, iterations, seed)
        best, at = -1.0, iterations
        for number, probability in enumerate(tree.staged_predict_proba(validation.features), start=1):
            if number % _EVERY and number < iterations:
                continue
            value = auc(probability[:, 1], validation.labels[:, 0])
            value = 0.0 if math.isnan(value) else value
            if value > best:
                best, at = value, number
        yield Trial(settings, best, at, tree)


def predict(tree: HistGradientBoostingClassifier, features: Floats, iterations: int) -> Counts:
    """Probabilities [C] by the first trees of a model."""
    stages = enumerate(tree.staged_predict_proba(features), start=1)
    return next(found[:, 1] for number, found in stages if number == iterations).astype(np.float64)


COLUMNS = {
    "split": "{split}",
    "candidates": "{samples:,}",
    "AUC": "{auc:.4f}",
    "GAUC": "{gauc:.4f}",
    "logloss": "{logloss:.4f}",
    "PCOC": "{pcoc:.3f}",
}


def main(words: Sequence[str]) -> None:
    options = Options("tree", __doc__)
    options.add_argument("--log", type=Path, required=True)
    options.add_argument("--history-length", type=int, default=0, help="behaviors of a window; 0: all")
    options.add_argument("--share", type=float, default=1.0, help="of the train split's users")
    options.add_argument("--trials", type=int, default=1, help="settings to choose from; 1: the default ones")
    options.add_argument("--seed", type=int, default=17)
    given = options.read(words)
    report, made = Report(given, "A tree on hand-made counts", seed=given.seed), dict[str, Any]()

    def read() -> None:
        made["train"] = read_samples(given.log, "train", given.history_length, given.share, given.seed)

    seconds = {"features": seconds_of(read).wall}
    train = made["train"].of_task(0)
    validation = read_samples(given.log, "validation", given.history_length).of_task(0)
    to_try = settings_to_try(given.trials, given.seed)

    def choose() -> None:
        trials = tried(train, validation, to_try, ITERATIONS, given.seed)
        made["best"] = max(trials, key=lambda trial: trial.auc)

    seconds["training"] = seconds_of(choose).wall
    best: Trial = made["best"]
    test = read_samples(given.log, "test", given.history_length).of_task(0)
    for split, samples in {"validation": validation, "test": test}.items():
        score = predict(best.tree, samples.features, best.iterations)
        groups = group_keys(samples.user, samples.request)
        metrics = measure(score, samples.labels[:, 0], groups, group_keys(samples.user))
        report.rows.append({"split": split, **asdict(metrics)})
    report.table(COLUMNS, report.rows)
    count, width = train.features.shape
    chosen = f"{best.settings.told()}, {best.iterations} trees, the best of {len(to_try)} on validation"
    report.line(f"{count:,} candidates to train on, {width} features; {chosen}.")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    report.line(f"{spent}; scikit-learn {sklearn.__version__}.")
    report.facts = seconds
    report.close()
