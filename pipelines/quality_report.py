"""What a person reads of metrics: tables, and plain sentences about what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipelines.console import table_lines
from trainer.quality.metrics import Metrics, number
from trainer.quality.ranking import RANKS

# Baseline -> its numbers; of one task.
Table = Mapping[str, Mapping[str, Any]]

_MODEL = "trained model"
_REMEDY = (
    "what may help: more steps (train.epochs, train.max_steps), other learning rates (train.learning_rate, "
    "groups.NAME.learning_rate), a shorter warm-up"
)
# What only probabilities have.
_PROBABLE = ("logloss", "ne", "pcoc", "ece")
# A model is compared with baselines by these, and by whether more is better.
_COMPARED = {"auc": ("AUC", 1), "gauc": ("GAUC", 1), "logloss": ("logloss", -1)}
# PCOC outside of this is worth a sentence, if the split has enough positives to tell.
_CALIBRATED = (0.8, 1.25)


def title(baseline: str, feature: str) -> str:
    """A baseline in words; `feature` is what `category_count` counts."""
    words = {
        "mean_label": "mean label",
        "item_rate": "item rate",
        "user_item_rate": "user + item rate",
        "popularity": "item popularity",
        "item_count": "own past count of item_id",
        "category_count": f"own past count of {feature}",
    }
    return words[baseline]


def task_table(task: str, metrics: Metrics, table: Table, feature: str) -> list[str]:
    """The model of one task beside its baselines, and by how much it leads the best of them."""
    k = shown_rank(metrics)
    names = ["gauc", "gauc_user", f"hr_{k}", *([f"ndcg_{k}"] if k > 1 else []), *_PROBABLE]
    head = [task, "AUC", "GAUC", "user GAUC", f"HR@{k}", *([f"NDCG@{k}"] if k > 1 else [])]
    entries = {_MODEL: metrics.as_dict(), **{title(name, feature): row for name, row in table.items()}}
    rows = []
    for name, row in entries.items():
        others = (number(row[each]) if each in row else "-" for each in names)
        known = row["auc_ci"] > 0 and not math.isnan(row["auc"])
        auc = number(row["auc"]) + (f" ± {number(row['auc_ci'])}" if known else "")
        rows.append([name, auc, *others])
    lines = table_lines([*head, "logloss", "NE", "PCOC", "ECE"], rows)
    share = f"{metrics.positives:,} positive ({metrics.positives / max(metrics.samples, 1):.1%})"
    lines.append(
        f"{share}; GAUC, HR and NDCG over the {metrics.groups:,} requests with both classes, "
        f"user GAUC over {metrics.users:,} users"
    )
    best = _best(table, "auc", 1)
    if best is not None and not math.isnan(metrics.auc) and "auc_lead" in table[best]:
        lead, half = table[best]["auc_lead"], table[best]["auc_lead_ci"]
        interval = "" if math.isnan(half) else f" ± {number(half)}"
        lines.append(f"AUC of the trained model less that of {title(best, feature)}: {lead:+.4f}{interval}")
    return lines


def shown_rank(metrics: Metrics) -> int:
    """The k of HR@k that a table shows: the largest below the mean number of candidates in a request."""
    mean = metrics.samples / metrics.requests if metrics.requests else 0
    return max(k for k in RANKS if k == RANKS[0] or k < mean)


def slices_table(task: str, slices: Mapping[str, Metrics]) -> list[str]:
    """Metrics by how many behaviors a request saw."""
    head = [f"{task}, by behaviors seen", "candidates", "positive", "AUC", "GAUC", "logloss", "PCOC"]
    rows = []
    for name, part in slices.items():
        numbers = map(number, (part.auc, part.gauc, part.logloss, part.pcoc))
        rows.append([name, f"{part.samples:,}", f"{part.positives:,}", *numbers])
    return table_lines(head, rows)


def remarks(
    split: str, metrics: Mapping[str, Metrics], tables: Mapping[str, Table], feature: str
) -> list[str]:
    """Plain sentences: what is empty and why, baselines that beat the model, predictions out of scale."""
    wrong = [
        f"{split}, {task}: {words}"
        for task, own in metrics.items()
        for words in [*_lost(own, tables[task], feature), *_scale(own)]
    ]
    return [*_empty(split, metrics), *wrong, *([_REMEDY] if wrong else [])]


def _empty(split: str, metrics: Mapping[str, Metrics]) -> Iterator[str]:
    """Each reason once, with the tasks that it holds for."""
    reasons: dict[str, list[str]] = {}
    for task, own in metrics.items():
        if not own.samples:
            reason = "all metrics are empty, since no candidate has a label"
        elif math.isnan(own.auc):
            reason = f"AUC, GAUC, HR, NDCG and NE are empty, since all labels are {own.rate:g}"
        elif not own.groups:
            reason = "GAUC, HR and NDCG are empty, since no request holds both classes"
        else:
            continue
        reasons.setdefault(reason, []).append(task)
    for reason, tasks in reasons.items():
        yield f"{split}, {' and '.join(tasks)}: {reason}"
    if any(math.isnan(own.auc_ci) > math.isnan(own.auc) for own in metrics.values()):
        yield f"{split}: AUC has no interval (±), since there is a single user"


def _best(table: Table, metric: str, sign: int) -> str | None:
    known = {name: row[metric] for name, row in table.items() if not math.isnan(row.get(metric, math.nan))}
    return max(known, key=lambda name: sign * known[name]) if known else None


def _lost(metrics: Metrics, table: Table, feature: str) -> Iterator[str]:
    """One sentence for each baseline that is the best one by some metric, and better than the model."""
    lost: dict[tuple[str, bool], list[str]] = {}
    for metric, (word, sign) in _COMPARED.items():
        best, own = _best(table, metric, sign), metrics.as_dict()[metric]
        if best is None or not sign * own < sign * table[best][metric]:
            continue
        half = table[best].get("auc_lead_ci", math.nan) if metric == "auc" else math.nan
        lead = table[best].get("auc_lead", math.nan)
        far = "" if math.isnan(half) else f" ({lead:+.4f} ± {half:.4f})"
        # Where chance alone may have made the difference, neither of the two is better.
        lost.setdefault((best, abs(lead) <= half), []).append(
            f"{word} {own:.4f} against {table[best][metric]:.4f}{far}"
        )
    for (best, even), parts in lost.items():
        verb = "is no better than" if even else "loses to"
        yield f"the trained model {verb} `{title(best, feature)}`: {', '.join(parts)}"


def _scale(metrics: Metrics) -> Iterator[str]:
    pcoc, low, high = metrics.pcoc, *_CALIBRATED
    # Three standard errors of a count: what chance alone may do to few positives is no remark.
    chance = 3 / math.sqrt(max(metrics.rate * metrics.samples, 1)) if metrics.samples else math.inf
    if not low <= pcoc <= high and abs(pcoc - 1) > chance:
        yield f"PCOC is {pcoc:.2f}: the predictions add up to {pcoc:.2f} times the labels"


def baselines_key(split: str) -> str:
    """Where summary.json keeps the baselines of a split."""
    return "baselines" if split == "test" else f"baselines_{split}"


def without(problems: Sequence[str]) -> list[str]:
    """A line for each baseline that is missing, and why."""
    return [f"left out: {problem}" for problem in problems]
