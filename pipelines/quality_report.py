"""What a person reads of metrics: tables, and plain sentences about what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipelines.console import table_lines
from trainer.quality.balance import FACTOR, Pair, Stratum, most_comparable
from trainer.quality.domains import COMPARED, UNOBSERVED, OverDomains, SplitMetrics
from trainer.quality.metrics import Metrics, number
from trainer.quality.ranking import RANKS

# Baseline -> its numbers; of one task.
Table = Mapping[str, Mapping[str, Any]]
# More tasks than these get one table for all of them instead of tables for each.
_MOST_TASKS = 2
# The largest domains are shown; summary.json has all of them.
_MOST_DOMAINS = 12

_MODEL = "trained model"
_REMEDY = (
    "what may help: more steps (train.epochs, or passes and steps of phases), other learning rates "
    "(train.learning_rate, groups.NAME.learning_rate), a shorter warm-up"
)
# What only probabilities have.
_PROBABLE = ("logloss", "ne", "pcoc", "ece")
# A model is compared with baselines by these, and by whether more is better.
_COMPARED = {"auc": ("AUC", 1), "gauc": ("GAUC", 1), "logloss": ("logloss", -1)}
# What slices show, each with its interval.
_WITH_INTERVALS = ("auc", "gauc", "logloss", "pcoc")
# What tables of all tasks show by domain.
_TITLES = {"auc": "AUC", "logloss": "logloss", "pcoc": "PCOC"}
# PCOC outside of this is worth a sentence, if the split has enough positives to tell.
_CALIBRATED = (0.8, 1.25)
# What a sentence lists.
_MOST_NAMED = 5


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
        rows.append([name, _with_interval(row["auc"], row["auc_ci"]), *others])
    lines = table_lines([*head, "logloss", "NE", "PCOC", "ECE"], rows)
    share = f"{metrics.positives:,} positive ({metrics.positives / max(metrics.samples, 1):.1%})"
    lines.append(
        f"{share} of {metrics.samples:,} labelled; GAUC, HR and NDCG over the {metrics.groups:,} requests "
        f"with both classes, user GAUC over {metrics.users:,} users"
    )
    if any(half > 0 for half in (metrics.gauc_ci, metrics.logloss_ci, metrics.pcoc_ci)):
        shown = (("GAUC", "gauc"), ("logloss", "logloss"), ("PCOC", "pcoc"))
        words = (f"{name} {_interval(metrics, metric)}" for name, metric in shown)
        lines.append(f"trained model, 95 % intervals over users: {', '.join(words)}")
    if metrics.pcoc_weighted is not None:
        # No baseline has it: a column of its own would be empty but for one number.
        lines.append(f"weighted PCOC of the trained model: {number(metrics.pcoc_weighted)}")
    if best := _lead(metrics, table, feature):
        lines.append("AUC of the trained model less that of {}: {}".format(*best))
    return lines


def _with_interval(value: float, half: float) -> str:
    return number(value) + (f" ± {number(half)}" if half > 0 and not math.isnan(value) else "")


def _interval(metrics: Metrics, metric: str) -> str:
    """A metric that has an interval, with it."""
    return _with_interval(getattr(metrics, metric), getattr(metrics, f"{metric}_ci"))


def _lead(metrics: Metrics, table: Table, feature: str) -> tuple[str, str] | None:
    """The best baseline by AUC, and by how much the model leads; None where nothing can be compared."""
    best = _best(table, "auc", 1)
    if best is None or math.isnan(metrics.auc) or "auc_lead" not in table[best]:
        return None
    lead, half = table[best]["auc_lead"], table[best]["auc_lead_ci"]
    return title(best, feature), f"{lead:+.4f}" + ("" if math.isnan(half) else f" ± {number(half)}")


def shown_rank(metrics: Metrics) -> int:
    """The k of HR@k that a table shows: the largest below the mean number of candidates in a request."""
    mean = metrics.samples / metrics.requests if metrics.requests else 0
    return max(k for k in RANKS if k == RANKS[0] or k < mean)


def slices_table(task: str, slices: Mapping[str, Metrics]) -> list[str]:
    """Metrics by how many behaviors a request saw."""
    head = [f"{task}, by behaviors seen", "candidates", "positive", "AUC", "GAUC", "logloss", "PCOC"]
    rows = []
    for name, part in slices.items():
        numbers = (_interval(part, metric) for metric in _WITH_INTERVALS)
        rows.append([name, f"{part.samples:,}", f"{part.positives:,}", *numbers])
    return table_lines(head, rows)


def report(
    measured: SplitMetrics,
    tables: Mapping[str, Table],
    slices: Mapping[str, Mapping[str, Metrics]],
    pairs: Mapping[Pair, Mapping[str, Stratum]],
    feature: str,
    domain: str,
) -> list[str]:
    """All tables of a split: of each task beside its baselines, or of all tasks where they are several.

    Args:
        tables: by task; slices: by task, then by history; pairs: see `by_balance`.
        feature: what `category_count` counts; domain: the feature of domains.
    """
    lines = []
    # What is empty is told in a sentence, see `remarks`.
    observed = {task: own for task, own in measured.tasks.items() if own.samples}
    if len(measured.tasks) <= _MOST_TASKS:
        for task, own in observed.items():
            lines += [
                "",
                *task_table(task, own, tables[task], feature),
                "",
                *slices_table(task, slices[task]),
            ]
            if measured.domains:
                lines += ["", *domains_table(task, measured.of_task(task), domain)]
    else:
        lines += ["", *tasks_table(measured.tasks, tables, feature)]
        auc = {t: {name: _interval(part, "auc") for name, part in slices[t].items()} for t in observed}
        if observed:
            lines += ["", *_matrix("AUC by behaviors seen", auc)]
        if observed and measured.domains:
            lines += domain_matrices(replace(measured, tasks=observed), domain)
    pairs = {pair: strata for pair, strata in pairs.items() if observed.keys() >= set(pair)}
    return [*lines, *(["", *balance_table(pairs)] if pairs else [])]


def tasks_table(metrics: Mapping[str, Metrics], tables: Mapping[str, Table], feature: str) -> list[str]:
    """A line a task: the model, and by how much it leads the task's best baseline."""
    head = ["task", "labelled", "positive", "AUC", "GAUC", "logloss", "PCOC"]
    rows = []
    for task, own in metrics.items():
        best = _lead(own, tables[task], feature) or ("-", "-")
        numbers = map(number, (own.gauc, own.logloss, own.pcoc))
        counts = f"{own.samples:,}", f"{own.positives:,}"
        rows.append([task, *counts, _interval(own, "auc"), *numbers, *best])
    return table_lines([*head, "best baseline", "AUC lead"], rows)


def domains_table(task: str, domains: Mapping[str, Metrics], feature: str) -> list[str]:
    """Metrics of one task by domain, the largest domains first; then what they come to."""
    head = [f"{task}, by {feature}", "candidates", "positive", "AUC", "GAUC", "logloss", "PCOC"]
    shown, hidden = _largest({name: own.samples for name, own in domains.items()})
    rows = []
    for name in shown:
        own = domains[name]
        numbers = (_interval(own, metric) for metric in _WITH_INTERVALS)
        rows.append([name, f"{own.samples:,}", f"{own.positives:,}", *numbers])
    over = OverDomains.of(domains)
    if several := len(over.metrics) > 1:
        mean = f"mean of {len(over.metrics)} domains"
        rows.append([mean, "", "", number(over.mean("auc")), "", number(over.mean("logloss")), ""])
    worst = ", ".join(_worst(over, metric) for metric in COMPARED)
    left_out = [f"{name} ({reason})" for name, reason in over.left_out.items()]
    return [
        *table_lines(head, rows),
        *hidden,
        *([f"worst domain: {worst}"] if several else []),
        *([_not_compared(left_out)] if left_out and _in_several(domains) else []),
    ]


def _in_several(domains: Mapping[str, Metrics]) -> bool:
    """Whether a task was observed in more than one domain: else there is nothing to compare."""
    return sum(own.samples > 0 for own in domains.values()) > 1


def _not_compared(domains: Sequence[str]) -> str:
    return f"not in the mean and not the worst: {_listed(domains)}"


def _worst(over: OverDomains, metric: str) -> str:
    name = over.worst(metric)
    shown = _with_interval(over.value(name, metric), over.value(name, f"{metric}_ci"))
    return f"{name} by {_TITLES[metric]} ({shown})"


def domain_matrices(measured: SplitMetrics, feature: str) -> list[str]:
    """AUC, logloss and PCOC of all tasks by domain, each with an empty line before it."""
    over = measured.over_domains()
    largest = {name: max(m.samples for m in own.values()) for name, own in measured.domains.items()}
    shown, hidden = _largest(largest)
    lines = []
    for metric, name_of in _TITLES.items():
        columns: dict[str, dict[str, str]] = {}
        for task in measured.tasks:
            own = {name: measured.domains[name][task] for name in shown}
            columns[task] = {name: _interval(part, metric) for name, part in own.items()}
            if metric in COMPARED and any(len(found.metrics) > 1 for found in over.values()):
                worst = over[task].worst(metric) if len(over[task].metrics) > 1 else None
                mean = math.nan if worst is None else over[task].mean(metric)
                columns[task]["mean of domains"] = number(mean)
                columns[task]["worst of domains"] = number(over[task].value(worst, metric))
                columns[task]["which is"] = worst or "-"
        lines += ["", *_matrix(f"{name_of} by {feature}", columns), *hidden]
    tasks: dict[tuple[str, str], list[str]] = {}
    for task, found in over.items():
        for place in found.left_out.items() if _in_several(measured.of_task(task)) else ():
            tasks.setdefault(place, []).append(task)
    reasons = [f"{name} of {', '.join(names)} ({reason})" for (name, reason), names in tasks.items()]
    return [*lines, *([_not_compared(reasons)] if reasons else [])]


def balance_table(pairs: Mapping[Pair, Mapping[str, Stratum]]) -> list[str]:
    """Metrics by feedback balance of the pair of tasks with most candidates of comparable feedback."""
    pair = most_comparable(pairs)
    head = [" and ".join(pair), "users", "candidates"]
    rows = []
    for name, stratum in pairs[pair].items():
        own = [stratum.metrics[task] for task in pair]
        numbers = [[_interval(m, "auc"), _interval(m, "gauc")] for m in own]
        rows.append([name, f"{stratum.users:,}", f"{stratum.candidates:,}", *numbers[0], *numbers[1]])
    lines = table_lines([*head, *(f"{task} {what}" for task in pair for what in ("AUC", "GAUC"))], rows)
    counted_in = next(iter(pairs[pair].values())).counted_in
    lines.append(
        f"by feedback balance; comparable: neither number of a user's positives in {counted_in} is above "
        f"{FACTOR:g} times the other"
    )
    if counted_in != "train":
        lines.append(
            "training has no positive of these users: in strata by measured labels only GAUC means something"
        )
    if "comparable" not in pairs[pair]:
        lines.append("no user's feedback on two tasks is comparable")
    elif len(pairs) > 1:
        lines.append(f"of {len(pairs)} pairs of tasks, this one has most comparable candidates")
    return lines


def _listed(words: Sequence[str]) -> str:
    more = f" and {len(words) - _MOST_NAMED} more" if len(words) > _MOST_NAMED else ""
    return ", ".join(words[:_MOST_NAMED]) + more


def _largest(sizes: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """-> (the names with the largest sizes, a line about the others if there are any)."""
    names = sorted(sizes, key=lambda name: -sizes[name])
    others = len(names) - _MOST_DOMAINS
    hidden = [f"and {others:,} smaller domains, see summary.json"] if others > 0 else []
    return names[:_MOST_DOMAINS], hidden


def _matrix(corner: str, columns: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A table with a column a task; all columns have the same rows."""
    names = next(iter(columns.values()))
    return table_lines(
        [corner, *columns], [[name, *(own[name] for own in columns.values())] for name in names]
    )


def remarks(split: str, measured: SplitMetrics, tables: Mapping[str, Table], feature: str) -> list[str]:
    """Plain sentences: what is empty and why, baselines that beat the model, predictions out of scale.

    Where the weights of the loss are what moves predictions, that is said, and nothing is wrong.
    """
    moved = [
        f"{split}, {task}: the loss's weights (e.g. of repeated exposures) shift predictions: "
        f"PCOC is {own.pcoc:.2f}, weighted PCOC is {own.pcoc_weighted:.2f}"
        for task, own in measured.tasks.items()
        if _moved_by_weights(own)
    ]
    wrong = [
        f"{split}, {task}: {words}"
        for task, own in measured.tasks.items()
        for words in [*_lost(own, tables[task], feature), *_scale(own)]
    ]
    wrong += [f"{split}: {words}" for words in _scales(measured)]
    unnamed = [measured.unnamed] if measured.unnamed else []
    return [*unnamed, *_empty(split, measured.tasks), *moved, *wrong, *([_REMEDY] if wrong else [])]


def _empty(split: str, metrics: Mapping[str, Metrics]) -> Iterator[str]:
    """Each reason once, with the tasks that it holds for."""
    reasons: dict[str, list[str]] = {}
    for task, own in metrics.items():
        if not own.samples:
            reason = f"all metrics are empty, since {UNOBSERVED}"
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
    values = metrics.as_dict()
    for metric, (word, sign) in _COMPARED.items():
        best, own = _best(table, metric, sign), values[metric]
        if metric == "logloss" and _moved_by_weights(metrics):
            # Baselines follow labels without weights, which is not what the loss asks for.
            continue
        if best is None or not sign * own < sign * table[best][metric]:
            continue
        lead, half = own - table[best][metric], table[best].get(f"{metric}_lead_ci")
        if half is None:
            # Unpaired, for want of the model's scores: too wide where both err on the same users.
            of_both = [row.get(f"{metric}_ci", math.nan) for row in (values, table[best])]
            half = math.hypot(*of_both)
        if metric == "logloss" and math.isnan(half) and all(even for _, even in lost):
            # It may be chance, and no other metric says that it is not.
            continue
        far = "" if math.isnan(half) else f" ({lead:+.4f} ± {half:.4f})"
        # Where chance alone may have made the difference, neither of the two is better.
        lost.setdefault((best, abs(lead) <= half), []).append(
            f"{word} {own:.4f} against {table[best][metric]:.4f}{far}"
        )
    for (best, even), parts in lost.items():
        verb = "is no better than" if even else "loses to"
        yield f"the trained model {verb} `{title(best, feature)}`: {', '.join(parts)}"


def _scale(metrics: Metrics) -> Iterator[str]:
    if _out_of_scale(metrics) and not _moved_by_weights(metrics):
        pcoc = metrics.pcoc
        yield f"PCOC is {pcoc:.2f}: the predictions add up to {pcoc:.2f} times the labels"


def _scales(measured: SplitMetrics) -> Iterator[str]:
    """One sentence about all domains, the farthest off first; a task in a single domain has its own."""
    off = [
        (abs(math.log(max(own.pcoc, 1e-9))), f"{own.pcoc:.2f} in {domain} ({task})")
        for task in measured.tasks
        if _in_several(domains := measured.of_task(task))
        for domain, own in domains.items()
        if _out_of_scale(own) and not _moved_by_weights(own)
    ]
    if off:
        yield f"by domain, PCOC is {_listed([words for _, words in sorted(off, reverse=True)])}"


def _out_of_scale(metrics: Metrics) -> bool:
    low, high = _CALIBRATED
    # Three standard errors of a count: what chance alone may do to few positives is no remark.
    chance = 3 / math.sqrt(max(metrics.rate * metrics.samples, 1)) if metrics.samples else math.inf
    return not low <= metrics.pcoc <= high and abs(metrics.pcoc - 1) > chance


def _moved_by_weights(metrics: Metrics) -> bool:
    """Whether predictions out of scale are what the weights of the loss ask for."""
    low, high = _CALIBRATED
    weighted = metrics.pcoc_weighted
    return weighted is not None and low <= weighted <= high and _out_of_scale(metrics)


def baselines_key(split: str) -> str:
    """Where summary.json keeps the baselines of a split."""
    return "baselines" if split == "test" else f"baselines_{split}"


def without(problems: Sequence[str]) -> list[str]:
    """A line for each baseline that is missing, and why."""
    return [f"left out: {problem}" for problem in problems]
