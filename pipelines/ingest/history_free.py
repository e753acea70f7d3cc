"""How much the choice of candidates tells of the label to a model that sees no history at all.

A small boosted tree is given facts of a candidate that have nothing to do with its user
(`pipelines.ingest.candidate_facts`). What it finds is not what a recommender is built for: a model that
learns the same beats others in a table and nothing in a service. So every log says the number, and warns of a
large one. Of impressions, which were chosen by somebody else, it is a line to beat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from ibis.expr import types as ir

from pipelines.ingest.candidate_facts import GROUPS, Facts, candidate_facts
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.engine import Engine
from pipelines.ingest.portable_hash import digest
from pipelines.ingest.protocols.table import PROTOCOLS
from trainer.log.schema import LogManifest, SplitInfo
from trainer.quality.ranking import auc

_TRAIN = "train"
_MOST = {_TRAIN: 100_000}  # candidates that are drawn of a split
_MOST_OTHERS = 50_000
_LEAST = 500  # positives and negatives of training, and of a split that is measured
_TOO_GOOD = 0.60
_CARRIES = 0.55  # a kind of fact with more than that by itself is named in a warning
_TELLS_TIME = 0.3  # the rank correlation of ids and first events from which on it is worth a word
_ITEMS = 50_000  # items of which ids and times are compared
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def history_free(
    engine: Engine, events: ir.Table, offered: ir.Table, splits: Mapping[str, SplitInfo], config: IngestConfig
) -> dict[str, Any]:
    """What the report says: `auc`, `popularity` and `candidates` by split, `alone` where `auc` is large.

    `auc` is that of the tree, and `popularity` of the plain order by the events of an item so far. Trees are
    trained on one half of a sample of training requests and measure the other, and the other way round; other
    splits get the mean of both. `alone` has, for the split with the largest AUC, that of trees on one kind of
    fact each; popularity is judged there on items that were seen before. `id_order`: the rank correlation of
    the ids of items and their first events.

    Empty where training has too few candidates of either class, or `report.history_free` is off.
    """
    if not config.report.history_free or not _enough(splits.get(_TRAIN)):
        return {}
    shares = {
        name: _MOST.get(name, _MOST_OTHERS) / info.candidates
        for name, info in splits.items()
        if _enough(info)
    }
    facts = candidate_facts(engine, events, offered, shares, config)
    measured = measure(facts, list(shares), config.seed)
    return measured and {"task": config.tasks[0], **measured, "id_order": id_order(engine, events, config)}


def _enough(info: SplitInfo | None) -> bool:
    return info is not None and min(info.positives, info.candidates - info.positives) >= _LEAST


def measure(facts: Facts, splits: Sequence[str], seed: int) -> dict[str, Any]:
    """`auc`, `popularity`, `candidates` and, where an AUC is large, `alone`; see `history_free`."""
    # Not at the top: scikit-learn takes a second to import, and small logs have no use for it.
    import sklearn.ensemble  # noqa: F401
    from threadpoolctl import threadpool_limits

    # The number of threads decides in which order a tree adds up, and so its last bits.
    with threadpool_limits(1, user_api="openmp"):
        return _measured(facts, splits, seed)


def _measured(facts: Facts, splits: Sequence[str], seed: int) -> dict[str, Any]:
    observed = ~np.isnan(facts.label)
    found = _by_split(facts, list(facts.columns), observed, splits, seed)
    if not found:
        return {}
    count = facts.columns["count"]
    worst = max(found, key=lambda split: found[split])
    parts = {split: observed & (facts.split == split) for split in found}
    report: dict[str, Any] = {
        "auc": {split: round(value, 4) for split, value in found.items()},
        "popularity": {
            split: round(auc(count[part], facts.label[part] >= 0.5), 4) for split, part in parts.items()
        },
        "candidates": {split: int(part.sum()) for split, part in parts.items()},
    }
    if found[worst] > _TOO_GOOD:
        alone = {}
        for group in GROUPS:
            judged = observed & facts.seen if group == "popularity" else observed
            if value := _by_split(facts, facts.of(group), judged, [worst], seed):
                alone[group] = round(value[worst], 4)
        report["alone"] = {"split": worst, "auc": alone}
    return report


def _by_split(
    facts: Facts, names: Sequence[str], judged: Bools, splits: Sequence[str], seed: int
) -> dict[str, float]:
    """split -> AUC of trees on some columns, of the candidates that are judged; without small splits."""
    table = np.stack([facts.columns[name] for name in names], axis=1)
    label, halves = facts.label >= 0.5, [judged & (facts.half == half) for half in (0, 1)]
    train = facts.split == _TRAIN
    if not all(_both(label[half & train]) for half in halves):
        return {}
    # A tree cannot take a column in which nothing at all is known.
    known = [(~np.isnan(table[half & train])).any(axis=0) for half in halves]
    table = np.where(np.logical_and(*known), table, 0.0)
    trees = [_tree(table[half & train], label[half & train], seed) for half in halves]
    found = {}
    for split in splits:
        part = judged & (facts.split == split)
        if not _both(label[part]):
            continue
        if split == _TRAIN:
            unseen = [part & half for half in reversed(halves)]
            each = zip(trees, unseen, strict=True)
            found[split] = float(np.mean([auc(_score(tree, table[own]), label[own]) for tree, own in each]))
            continue
        scores = [_score(tree, table[part]) for tree in trees]
        found[split] = auc(np.mean(scores, axis=0), label[part])
    return found


def _both(label: Bools) -> bool:
    """Whether there are enough positives and negatives for a number that means something."""
    return min(int(label.sum()), int((~label).sum())) >= _LEAST // 2


def _tree(table: Floats, label: Bools, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    tree = HistGradientBoostingClassifier(
        max_iter=50, max_leaf_nodes=15, min_samples_leaf=100, early_stopping=False, random_state=seed % 2**32
    )
    return tree.fit(table, label)


def _score(tree: Any, table: Floats) -> Floats:
    score: Floats = tree.decision_function(table)
    return score


def id_order(engine: Engine, events: ir.Table, config: IngestConfig) -> float | None:
    """The rank correlation (Spearman) of the ids of items and the seconds of their first events.

    Of a seeded sample of items; None where all have one time or one id.
    """
    from scipy.stats import spearmanr

    firsts = events.group_by("item_id").aggregate(since=events.timestamp.min())
    total = int(engine.rows(firsts.aggregate(items=firsts.count()))[0]["items"])
    if total > _ITEMS:
        key = digest(config.seed, "item", firsts.item_id)
        firsts = firsts.filter(key < f"{int(_ITEMS / total * 2**32):08x}")
    rows = engine.rows(firsts)
    value = float(spearmanr([row["item_id"] for row in rows], [row["since"] for row in rows]).statistic)
    return None if math.isnan(value) else round(value, 4)


def history_free_lines(manifest: LogManifest) -> list[str]:
    """The numbers, and a warning with what to do where one is too large."""
    report = manifest.report.get("history_free") or {}
    if not report:
        return []
    told = ", ".join(f"{split} {value:.4f}" for split, value in report["auc"].items())
    plain = ", ".join(f"{split} {value:.4f}" for split, value in report["popularity"].items())
    lines = [
        f"label {report['task']} without any history: a small tree on the candidates alone has AUC {told};"
        f" popularity as of the request {plain}"
    ]
    if (order := report["id_order"]) is not None:
        tells = abs(order) >= _TELLS_TIME
        advice = '; do not use the id as a number, or take events.item_ids = "hashed"' if tells else ""
        lines.append(f"ids of items follow the time of their first events by {order:+.2f} (Spearman){advice}")
    return lines + list(_warnings(report, manifest.ingest))


def _warnings(report: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[str]:
    if "alone" not in report:
        return
    alone, draws = report["alone"]["auc"], PROTOCOLS[settings["protocol"]].draws_negatives
    carriers = sorted((name for name in alone if alone[name] > _CARRIES), key=lambda name: -alone[name])
    told = ", ".join(f"{name} alone has {alone[name]:.4f}" for name in carriers)
    split = report["alone"]["split"]
    found = f"WARNING: candidates tell the label {report['task']} without any history: AUC"
    found += f" {report['auc'][split]:.4f} in {split}, above {_TOO_GOOD:.2f}"
    found += f"; {told}" if told else "; no kind of fact has it alone"
    if not draws:
        yield f"{found}; impressions are kept as shown, so this is no fault but a line that a model must beat"
        return
    advice = [words for name in carriers if (words := _advice(name, settings.get("requests", {})))]
    yield f"{found}; {'; '.join(advice or [_advice('popularity', settings.get('requests', {}))])}"


def _advice(kind: str, requests: Mapping[str, Any]) -> str:
    """What to do about a kind of fact that tells the label, where negatives are drawn."""
    days, drops = requests.get("popularity_days", 0), requests.get("new_items") == "drop"
    popularity = (
        f"requests.popularity_days = {days}: try a longer or a shorter time"
        if days
        else "requests.popularity_days draws negatives by the popularity of the last days: try 30 and 90"
    )
    return {
        "popularity": popularity,
        "novelty": popularity if drops else 'requests.new_items = "drop" leaves items out that nobody had',
        "company": "requests.positives = 1 leaves one item of a basket, or score candidates one by one",
        "position": "the order of candidates tells the label; no model may use it",
        "item id": 'events.item_ids = "hashed" makes ids that tell no time; use no id as a number',
    }[kind]
