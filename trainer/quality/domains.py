"""Metrics by domain: each domain on its own, the worst of them, and the mean over them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.errors import DataError
from trainer.log.known_values import values_of
from trainer.log.schema import VOCABULARIES, read_manifest
from trainer.quality.metrics import Metrics, entry_of, first_and_all, number
from trainer.quality.ranking import Ints
from trainer.quality.scored import Scored, Scores

# What domains are compared by, and whether more of it is better.
COMPARED = {"auc": 1, "logloss": -1}
# A domain with fewer positives or negatives is not compared: the worst of many small ones is worst by chance.
FEWEST = 20
UNOBSERVED = "no candidate has a label"


@dataclass(frozen=True)
class OverDomains:
    """What the domains of a split come to, of one task. Domains with enough of both classes are compared.

    Attributes:
        metrics: domain -> metrics, of those that are compared; left_out: the others, and why.
    """

    metrics: dict[str, Metrics]
    left_out: dict[str, str]

    @staticmethod
    def of(domains: Mapping[str, Metrics]) -> OverDomains:
        reasons = {name: reason for name, own in domains.items() if (reason := _not_compared(own))}
        compared = {name: own for name, own in domains.items() if name not in reasons}
        return OverDomains(compared, reasons)

    def worst(self, metric: str) -> str | None:
        """The domain with the worst value of a metric of `COMPARED`, the first one of several such."""
        sign = COMPARED[metric]
        return min(self.metrics, key=lambda name: sign * getattr(self.metrics[name], metric), default=None)

    def value(self, domain: str | None, metric: str) -> float:
        """A metric of one of the domains; NaN of none."""
        return math.nan if domain is None else float(getattr(self.metrics[domain], metric))

    def mean(self, metric: str) -> float:
        """The mean over domains, each of them once, whatever its size; NaN if none is compared."""
        values = [getattr(own, metric) for own in self.metrics.values()]
        return float(np.mean(values)) if values else math.nan

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {"compared": len(self.metrics)}
        for metric in COMPARED:
            worst = self.worst(metric)
            values[f"mean_{metric}"] = self.mean(metric)
            values[f"worst_{metric}"] = self.value(worst, metric)
            values[f"worst_{metric}_domain"] = worst
        return {**values, "left_out": self.left_out}


def _not_compared(own: Metrics) -> str:
    """Why a domain is neither the worst nor in the mean; empty where it may be."""
    if not own.samples:
        return UNOBSERVED
    if math.isnan(own.auc):
        return f"all labels are {own.rate:g}"
    negatives = own.samples - own.positives
    few, what = min((own.positives, "positives"), (negatives, "negatives"))
    return f"only {few} {what[:-1] if few == 1 else what}, fewer than {FEWEST}" if few < FEWEST else ""


@dataclass(frozen=True)
class SplitMetrics:
    """All metrics of a split.

    Attributes:
        tasks: task -> metrics of the whole split.
        domains: domain -> task -> metrics of that domain; empty where candidates have no domain.
        unnamed: why domains are called by their numbers, although the log has names; empty if they are not.
        sampled: (candidates that were scored, those of the split) where they are a sample of it.
        names: id of a domain -> what it is called in `domains`.
    """

    tasks: dict[str, Metrics]
    domains: dict[str, dict[str, Metrics]] = field(default_factory=dict)
    unnamed: str = ""
    sampled: tuple[int, int] | None = None
    names: dict[int, str] = field(default_factory=dict)

    def of_domain(self, domain: int) -> dict[str, Metrics]:
        """Task -> metrics of the domain with this id; empty where it has no candidate."""
        return self.domains.get(self.names.get(domain, ""), {})

    def of_task(self, task: str) -> dict[str, Metrics]:
        """Domain -> metrics of one task."""
        return {domain: metrics[task] for domain, metrics in self.domains.items()}

    def over_domains(self) -> dict[str, OverDomains]:
        """By task; empty where candidates have no domain."""
        return {task: OverDomains.of(self.of_task(task)) for task in self.tasks if self.domains}

    def entry(self) -> dict[str, Any]:
        """As files hold it: metrics of the first task, those of every task under `tasks`.

        With domains also `by_domain`, which has such an entry for each, and `over_domains`; of a sample also
        `sampled`.
        """
        entry = entry_of(self.tasks)
        if self.sampled:
            entry["sampled"] = dict(zip(("candidates", "of"), self.sampled, strict=True))
        if self.domains:
            entry["by_domain"] = {domain: entry_of(own) for domain, own in self.domains.items()}
            entry["over_domains"] = first_and_all(
                {t: own.as_dict() for t, own in self.over_domains().items()}
            )
        return entry

    def text(self) -> str:
        """What stands behind a colon on a terminal: a table with a line a task where there are several."""
        over, rows = self.over_domains(), []
        for task, own in self.tasks.items():
            worst, compared = "", len(over[task].metrics) if task in over else 0
            if compared > 1:
                name = over[task].worst("auc")
                worst = f"{number(over[task].value(name, 'auc'))} of {compared} ({name})"
            values = (number(own.auc), number(own.gauc), number(own.logloss), number(own.pcoc, 3))
            rows.append((task, *values, worst))
        names = ("AUC", "GAUC", "logloss", "PCOC", "worst domain's AUC")
        if len(rows) == 1:
            task, *single, worst = rows[0]
            if not self.tasks[task].samples:
                return f" {UNOBSERVED}"
            line = "  ".join(f"{name} {value}" for name, value in zip(names, single, strict=False))
            return f" {line}" + (f"  {names[-1]} {worst}" if worst else "")
        table: list[tuple[str, ...]] = [("task", *names), *rows]
        if not any(row[-1] for row in rows):
            table = [row[:-1] for row in table]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for task, *cells in table:
            if task in self.tasks and not self.tasks[task].samples:
                lines.append(f"{task:<{widths[0]}}  {UNOBSERVED}")
                continue
            numbers = "  ".join(
                f"{cell:>{width}}" for cell, width in zip(cells[:4], widths[1:5], strict=True)
            )
            lines.append("  ".join([f"{task:<{widths[0]}}", numbers, *cells[4:]]).rstrip())
        return "".join(f"\n  {line}" for line in lines)


def measure_split(scored: Scores, log: Path, feature: str) -> SplitMetrics:
    """Metrics of every task, and of every domain where candidates have one.

    Args:
        log: whose vocabulary has names of domains; feature: `data.domain`, empty without domains.
    """
    whole = scored.all_metrics()
    if not feature:
        return SplitMetrics(whole)
    numbered = _by_number(scored)
    names, problem = domain_names(log, feature, np.array(list(numbered), dtype=np.int64))
    called = {number: names.get(number, str(number)) for number in numbered}
    domains = {called[number]: own for number, own in numbered.items()}
    return SplitMetrics(whole, domains, problem, names=called)


def _by_number(scored: Scores) -> dict[int, dict[str, Metrics]]:
    """Number of the domain -> task -> metrics, ascending: a partition of the split."""

    def domain(part: Scored) -> Ints:
        assert part.domain is not None
        return part.domain

    return scored.metrics_by(domain, range(len(scored.tasks)))


def domain_names(log: Path, feature: str, domains: Ints) -> tuple[dict[int, str], str]:
    """-> (the names of these domains in the log's vocabulary, what was in the way or nothing).

    Domains are called by their numbers where the log has no vocabulary of them or it cannot be read.
    """
    ids = np.unique(domains)
    numbers = ids.tolist()
    manifest = read_manifest(log)
    info = {**manifest.features, **manifest.context}.get(feature)
    if info is None or not info.vocabulary:
        return {number: str(number) for number in numbers}, ""
    try:
        file = log / VOCABULARIES / f"{feature}.parquet"
        values = values_of(file, info.vocabulary, ids, of_log=True)
    except DataError as error:
        return {number: str(number) for number in numbers}, f"domains have no names: {error}"
    known = {number: _printable(value) for number, value in values.items()}
    return _distinct({number: known.get(number, "unknown") for number in numbers}), ""


def _printable(value: object) -> str:
    return "".join(sign if sign.isprintable() else "?" for sign in str(value)) or "(empty)"


def _distinct(names: Mapping[int, str]) -> dict[int, str]:
    """The same names, with the number behind those that several domains have."""
    count = Counter(names.values())
    return {n: name if count[name] == 1 else f"{name} ({n})" for n, name in names.items()}
