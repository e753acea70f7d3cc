"""A gradient-boosted tree on hand-made counts of a sequence log, which a model of embeddings must beat

    tandemrec bench tree --log runs/demo/log [--history-length 500] [--share 0.5] [--page FILE.md]

For each candidate and each of item_id and the taxonomy levels: how many behaviors of the request's window
have the candidate's id, the same decayed with a half-life of 30 days, and the seconds since the newest of
them. Besides, the item's popularity before the validation period, the number of visible behaviors and the
seconds since the newest one. Nothing at or after the request's time enters. Trained on the train split alone;
scikit-learn's HistGradientBoostingClassifier with fixed settings, so no split is used to choose any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.ensemble import HistGradientBoostingClassifier

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.harness.timing import seconds_of
from trainer.config.sections import DataConfig
from trainer.data.hard_search import hierarchical_search
from trainer.data.reader import SequenceLogReader
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.schema import read_manifest
from trainer.quality.baselines import item_counts
from trainer.quality.metrics import Metrics, group_keys, measure

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.float64]
HALF_LIFE = 30.0 * 86_400
SETTINGS = {"max_iter": 300, "learning_rate": 0.1, "max_leaf_nodes": 63, "min_samples_leaf": 100}


@dataclass(frozen=True)
class Samples:
    """Candidates of a split: features float32 [C, X], labels [C], grouping key of GAUC [C]."""

    features: Floats
    labels: Floats
    groups: Ints


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
    columns = Columns.of(manifest, {name: manifest.features[name].rows for name in levels})
    popularity, rng = (
        item_counts(log, np.arange(manifest.features["item_id"].rows)),
        np.random.default_rng(seed),
    )
    parts, labels, keys = [], [], []
    for place in SequenceLogReader(DataConfig(log=log), split, None).row_groups:
        rows = read_rows(place.file, place.row_group, columns)
        chosen = np.nonzero(rng.random(rows.user_id.size) < share)[0]
        for row in chosen.tolist():
            part = _row_features(rows, row, levels, length, popularity)
            candidates, key = _candidates(rows, row)
            parts.append(part)
            labels.append(rows.labels[candidates, 0])
            keys.append(key)
    key = np.concatenate(keys)
    return Samples(np.concatenate(parts), np.concatenate(labels), group_keys(key[:, 0], key[:, 1]))


def _candidates(rows: UserRows, row: int) -> tuple[slice, Ints]:
    """A row's candidates, and the (user, request) of each."""
    first, last = int(rows.request_offsets[row]), int(rows.request_offsets[row + 1])
    part = slice(int(rows.candidate_offsets[first]), int(rows.candidate_offsets[last]))
    request = np.repeat(rows.request_id[first:last], np.diff(rows.candidate_offsets[first : last + 1]))
    return part, np.stack([np.full(request.size, rows.user_id[row]), request], axis=1)


def _row_features(rows: UserRows, row: int, levels: Sequence[str], length: int, popularity: Counts) -> Floats:
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
    found += [popularity[rows.candidates["item_id"].values[part]], (end - start)[of]]
    found.append(_since(asked, when, newest)[of])
    return np.stack(found, axis=1).astype(np.float32)


def _since(asked: Ints, when: Ints, index: Ints) -> npt.NDArray[np.float64]:
    """Seconds from behavior `index` to the request; NaN, which a tree treats apart, where it is -1."""
    if not when.size:
        return np.full(index.shape, np.nan)
    return np.where(index >= 0, asked - when[index.clip(min=0)], np.nan)


def train_tree(samples: Samples, seed: int) -> HistGradientBoostingClassifier:
    tree = HistGradientBoostingClassifier(**SETTINGS, early_stopping=False, random_state=seed)
    return tree.fit(samples.features, samples.labels)


def score(tree: HistGradientBoostingClassifier, samples: Samples) -> Metrics:
    probability = tree.predict_proba(samples.features)[:, 1].astype(np.float64)
    return measure(probability, samples.labels.astype(np.float64), samples.groups)


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
    options.add_argument("--seed", type=int, default=17)
    given = options.read(words)
    report, made = Report(given, "A tree on hand-made counts", seed=given.seed), dict[str, Any]()

    def read() -> None:
        made["train"] = read_samples(given.log, "train", given.history_length, given.share, given.seed)

    def train() -> None:
        made["tree"] = train_tree(made["train"], given.seed)

    seconds = {"features": seconds_of(read).wall, "training": seconds_of(train).wall}
    for split in ("validation", "test"):
        metrics = score(made["tree"], read_samples(given.log, split, given.history_length))
        report.rows.append({"split": split, **asdict(metrics)})
    report.table(COLUMNS, report.rows)
    count, width = made["train"].features.shape
    settings = ", ".join(f"{name} {value}" for name, value in SETTINGS.items())
    report.line(f"{count:,} candidates to train on, {width} features; {settings}.")
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    report.line(f"{spent}; scikit-learn {sklearn.__version__}.")
    report.facts = seconds
    report.close()
