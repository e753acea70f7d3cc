"""Figures, tables and findings of the section `search`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipelines.analyze.means import mean_of_known
from pipelines.analyze.report.model import Bars, Figure, Finding, HeatMap, Line, Lines, Table
from pipelines.analyze.steps import steps_apart
from trainer.analysis.search.discriminability import Discriminability
from trainer.analysis.search.information import Floats, Ints, Truth
from trainer.analysis.search.measure import OWN, SearchMeasures, Tally
from trainer.analysis.search.relevance import rank_correlations, truth_of, weighted_places

# Candidates of a target category in the train split, as in DARE's code.
ENOUGH = 700
# Seeds of the clusters of pooled vectors.
SEEDS = 3
TRUTH = "pooled"


class Case(NamedTuple):
    """Runs with one case are measured against the same information."""

    log: str
    length: int
    feature: str
    task: str


@dataclass
class Measured:
    """What was measured of the runs of one case.

    Attributes:
        truth: the information; categories: those that are drawn; names: what they are called.
        runs: label -> its runs; seeds: label -> theirs, in the same order.
        clusters: label -> how well their vectors tell labels apart.
        beside: the references, by name.
        steps: label -> how long its runs were trained.
    """

    truth: Truth
    categories: Ints
    names: tuple[str, ...]
    runs: dict[str, list[SearchMeasures]]
    seeds: dict[str, list[int]]
    clusters: dict[str, list[Discriminability]]
    beside: dict[str, Tally]
    steps: dict[str, list[int]]

    @property
    def ranked(self) -> dict[str, list[SearchMeasures]]:
        """The runs that have an order of behaviors."""
        return {
            label: there
            for label, runs in self.runs.items()
            if (there := [run for run in runs if not run.obstacle and run.candidates])
        }


def figures_of(case: Case, found: Measured, end: str) -> Iterator[Figure | Table]:
    yield _quality(found, end)
    if found.ranked:
        yield _by_category(case, found, end)
        yield _by_recency(found, end)
        yield _relevance(case, found, end)
        yield _relevance_of_one(case, found, end)
    if found.clusters:
        yield _clusters(found, end)


def _of(runs: Sequence[SearchMeasures], measure: Callable[[Tally], float]) -> float:
    return mean_of_known([measure(run.tallies[TRUTH][OWN]) for run in runs])


def _quality(found: Measured, end: str) -> Table:
    rows: list[tuple[str | float | int | None, ...]] = []
    for label, runs in found.runs.items():
        if len(runs) > 1:
            rows += [
                (label, str(seed), *_measures(found, [run]))
                for seed, run in zip(found.seeds[label], runs, strict=True)
            ]
        rows.append((label, "mean" if len(runs) > 1 else str(found.seeds[label][0]), *_measures(found, runs)))
    k = next((run.k for runs in found.ranked.values() for run in runs), 0)
    for name, tally in found.beside.items():
        three = tally.mean("ndcg"), tally.mean("hits") / k, tally.mean("correlation")
        rows.append((name, "", k, *three, math.nan, math.nan))
    return Table(
        f"search-quality{end}",
        "How well the informative behaviors are kept",
        "NDCG@K: the information of the K kept behaviors, discounted by their order, over that of the K "
        "most informative ones in the window. Recall@K: the share of these that is kept. Rank "
        "correlation: Spearman's, of score and information over the whole window. All three are means "
        "over the candidates whose window holds more than K behaviors and whose category has at least "
        f"{ENOUGH:,} candidates in the train split. Correlation over cells: Spearman's, over the cells of "
        "the heat maps below. Information kept: that of the kept behaviors over that of all visible ones. "
        "Rows without seeds are searches that learn nothing.",
        (
            "search",
            "seed",
            "K",
            "NDCG@K",
            "recall@K",
            "rank correlation",
            "correlation over cells",
            "information kept",
        ),
        tuple(rows),
    )


def _measures(found: Measured, runs: Sequence[SearchMeasures]) -> tuple[float, ...]:
    """The columns of some runs: means."""
    share = mean_of_known([run.kept[TRUTH].share for run in runs if TRUTH in run.kept])
    ranked = [run for run in runs if not run.obstacle and run.candidates]
    return runs[0].k, *_three(ranked, runs[0].k), _cells(found, ranked), share


def _three(runs: Sequence[SearchMeasures], k: int) -> tuple[float, float, float]:
    return (
        _of(runs, lambda tally: tally.mean("ndcg")),
        _of(runs, lambda tally: tally.mean("hits")) / k,
        _of(runs, lambda tally: tally.mean("correlation")),
    )


def _cells(found: Measured, runs: Sequence[SearchMeasures]) -> float:
    """The mean rank correlation over the cells of target categories."""
    information = truth_of(found.truth, found.categories)
    return mean_of_known(
        [float(value) for run in runs for value in rank_correlations(run.learned.mean(), information)]
    )


def _by_category(case: Case, found: Measured, end: str) -> Figure:
    names = found.names
    bars = {label: _of_categories(found, runs) for label, runs in found.ranked.items()}
    for name, tally in found.beside.items():
        bars[name] = [tally.mean_of_category("ndcg", int(of)) for of in found.categories]
    return Figure(
        f"search-by-category{end}",
        "NDCG by category of the candidate",
        f"NDCG@K of the candidates of each of the {len(names)} most frequent categories ({case.feature}), "
        "most frequent first, means over seeds. A search that is good on the whole and bad on one "
        "category has not learned what matters there.",
        (Bars("NDCG@K", "NDCG@K", names, bars),),
        references=tuple(found.beside),
    )


def _of_categories(found: Measured, runs: Sequence[SearchMeasures]) -> list[float]:
    tallies = [run.tallies[TRUTH][OWN] for run in runs]
    return [
        mean_of_known([tally.mean_of_category("ndcg", int(of)) for tally in tallies])
        for of in found.categories
    ]


def _by_recency(found: Measured, end: str) -> Figure:
    starts = _starts(found.truth)
    lines = []
    for label, runs in found.ranked.items():
        values = np.array([run.tallies[TRUTH][OWN].recall_by_place() for run in runs])
        band = {"low": values.min(0), "high": values.max(0)} if len(runs) > 1 else {}
        lines.append(Line(label, starts, values.mean(0), **band))
    lines += [
        Line(name, starts, tally.recall_by_place(), dashed=True) for name, tally in found.beside.items()
    ]
    return Figure(
        f"search-by-recency{end}",
        "Recall by recency of the behavior",
        "Of the K most informative behaviors of each window, the share that is kept, by their place in "
        "the window (1 = newest; places are pooled to 1, 2-3, 4-7 and so on). Bands are the range over "
        "seeds. A search that falls towards the right forgets what lies far back.",
        (Lines("Recall@K", "place of the behavior", "share kept", tuple(lines), log_x=True),),
        references=tuple(found.beside),
    )


def _relevance(case: Case, found: Measured, end: str) -> Figure:
    names = found.names
    counts = [run.learned.count for runs in found.ranked.values() for run in runs]
    information = weighted_places(truth_of(found.truth, found.categories), counts[:1])
    axes = "behavior", "candidate", names, names
    maps = [HeatMap("mutual information, bits", *axes, _rows(information))]
    for label, runs in found.ranked.items():
        learned = np.mean([run.learned.over_places() for run in runs], axis=0)
        maps.append(HeatMap(f"learned by {label}", *axes, _rows(learned), centre=0.0))
    return Figure(
        f"search-relevance{end}",
        "Learned relevance beside information, by category",
        f"Left: the mutual information of behavior and label for the {len(names)} most frequent categories "
        f"({case.feature}) of candidates (rows) and behaviors (columns), all places together. Right: the "
        "mean score that the model ranks these behaviors by, less the mean of the candidate's window, "
        "with all features and the time bias. Relevance that follows information has the same pattern in "
        "both.",
        tuple(maps),
    )


def _relevance_of_one(case: Case, found: Measured, end: str) -> Figure:
    names, starts = found.names, tuple(str(start) for start in _starts(found.truth))
    information = truth_of(found.truth, found.categories)[0]
    axes = "place of the behavior", "behavior", starts, names
    maps = [HeatMap("mutual information, bits", *axes, _rows(information))]
    for label, runs in found.ranked.items():
        learned = np.mean([run.learned.mean()[0] for run in runs], axis=0)
        maps.append(HeatMap(f"learned by {label}", *axes, _rows(learned), centre=0.0))
    return Figure(
        f"search-relevance-by-place{end}",
        f"The same for candidates of {names[0]}, by place",
        "As above for the most frequent category of candidates: rows are categories of behaviors, columns "
        "the first of the places that are pooled. This is the figure of DARE's paper (attention "
        "accuracy); its published code scores by the category table alone and at another scale than the "
        "model, here it is the model's own score.",
        tuple(maps),
    )


def _clusters(found: Measured, end: str) -> Figure:
    lines, chance = [], None
    for label, runs in found.clusters.items():
        counts = runs[0].clusters
        values = np.concatenate([run.normalised for run in runs if run.clusters == counts], axis=1)
        lines.append(Line(label, counts, values.mean(1), values.min(1), values.max(1)))
        chance = chance or Line("shuffled labels", counts, runs[0].by_chance.mean(1), dashed=True)
    return Figure(
        f"search-discriminability{end}",
        "How well the pooled vector tells positives from negatives",
        "The pooled vector h of each candidate (what the model makes of its kept behaviors, and nothing "
        "else of what the head is given) is put into one of so many clusters by k-means; drawn is the "
        f"normalised mutual information of cluster and label, mean and range over {SEEDS} seeds of the "
        "clusters and the seeds of the runs. What clusters of the same vectors know about shuffled labels "
        "is chance.",
        (
            Lines(
                "Discriminability of h",
                "clusters",
                "NMI",
                (*lines, *([chance] if chance else [])),
                log_x=True,
            ),
        ),
        references=(chance.name,) if chance else (),
    )


def _starts(truth: Truth) -> list[int]:
    """The first place of each bin, from 1."""
    return [int(start) + 1 for start in np.searchsorted(truth.bins, np.arange(int(truth.bins[-1]) + 1))]


def _rows(values: Floats) -> list[list[float]]:
    return [list(map(float, row)) for row in values]


def findings_of(found: Measured, figure: str) -> Iterator[Finding]:
    means = {label: _of(runs, lambda tally: tally.mean("ndcg")) for label, runs in found.ranked.items()}
    beside: Mapping[str, float] = {name: tally.mean("ndcg") for name, tally in found.beside.items()}
    for label, ndcg in means.items():
        if ndcg < beside["random"]:
            random = f"NDCG {ndcg:.3f}, random behaviors {beside['random']:.3f}"
            yield Finding("alarm", f"{label}: its search keeps what tells least: {random}", figure)
    if len(means) > 1:
        best = max(means, key=lambda label: means[label])
        others = ", ".join(f"{label} {ndcg:.3f}" for label, ndcg in means.items() if label != best)
        text = f"The search of {best} keeps the informative behaviors best: NDCG {means[best]:.3f}; {others}"
        text += steps_apart({label: found.steps[label] for label in means})
        yield Finding("notice", text, figure, compares=True)
    clusters = {
        label: float(np.mean([run.normalised.mean() for run in runs]))
        for label, runs in found.clusters.items()
    }
    if len(clusters) > 1:
        best = max(clusters, key=lambda label: clusters[label])
        others = ", ".join(f"{label} {nmi:.4f}" for label, nmi in clusters.items() if label != best)
        text = f"The pooled vectors of {best} tell labels apart best: mean NMI {clusters[best]:.4f}; {others}"
        text += steps_apart({label: found.steps[label] for label in clusters})
        yield Finding("notice", text, figure.replace("quality", "discriminability"), compares=True)
