"""Entanglement: do the spaces of a model, one a role or set, hold different interests?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.errors import CheckpointError
from pipelines.analyze.options import AnalyzeOptions
from pipelines.analyze.report.model import Bars, Figure, Finding, HeatMap, Points, Section, Table
from pipelines.analyze.runs import AnalysedRun
from pipelines.analyze.table_ids import names_by_vocabulary
from trainer.analysis.entanglement import (
    Gate,
    Space,
    correlation,
    joined,
    joined_gates,
    mean_with_interval,
    pair_groups,
    principal,
    spaces_of,
)
from trainer.data.batch import RequestBatch
from trainer.log.schema import LogManifest
from trainer.model.windows import first_ids

# Items that are drawn of one neighbourhood, and the fewest that make one.
_ITEMS, _FEWEST = 300, 10
# A gate with less entropy, in nats, uses one expert; an expert with less weight is not used.
_ONE_EXPERT, _UNUSED = 0.05, 0.02

_INTRODUCTION = (
    "A space is what the vectors of one role or of one embedding set live in. Of each candidate it has an "
    "item's vector, its own, and a user's: the weighted sum of the kept behaviors. Where tasks want "
    "different things, several spaces help only if they come to differ: pairs that one task likes and the "
    "other does not are then near in one space and far in another. One space alone must put them in "
    "between."
)


@dataclass(frozen=True)
class _Found:
    """What was measured of one run.

    Attributes:
        spaces, gates: of all candidates of the sample; labels: task -> [C].
        items, categories: the id of each candidate, and of its category, int64 [C]; all 0 where the log has
            none.
        name_of: what a category is called.
    """

    spaces: dict[str, Space]
    gates: dict[str, Gate]
    labels: dict[str, npt.NDArray[np.float32]]
    items: npt.NDArray[np.int64]
    categories: npt.NDArray[np.int64]
    name_of: Callable[[int], str]


def analyse(runs: Sequence[AnalysedRun], options: AnalyzeOptions) -> Section:
    """Measure one run of each config, that of its first seed."""
    firsts: dict[str, AnalysedRun] = {}
    for run in runs:
        firsts.setdefault(run.label, run)
    figures: list[Figure | Table] = []
    findings: list[Finding] = []
    skipped = []
    for number, (label, run) in enumerate(firsts.items(), 1):
        end = "" if len(firsts) == 1 else f"-{number}"
        try:
            found = _measured(run, options)
        except CheckpointError as error:
            skipped.append(f"{label}: {error}")
            continue
        if found is None or not found.spaces:
            skipped.append(
                f"{label}: it has no space with vectors of one width for users and items, or no candidates."
            )
            continue
        figures += _figures(label, found, end)
        findings += _findings(label, found, end)
        if len(found.spaces) == 1:
            skipped.append(
                f"{label}: it has one space only, so that there is nothing to compare between spaces."
            )
    return Section(
        "entanglement", "Entanglement", _INTRODUCTION, tuple(figures), tuple(findings), tuple(skipped)
    )


def _measured(run: AnalysedRun, options: AnalyzeOptions) -> _Found | None:
    batches = [step.batch for step in run.reader(options.split, options.sample).steps()]
    if not batches:
        return None
    partial = run.model(batches)
    parts = [
        spaces_of(partial.model.module, partial.renumbered(batch).to(run.ranks.device)) for batch in batches
    ]
    item, category = _features(run.manifest)
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    return _Found(
        joined([spaces for spaces, _ in parts]),
        joined_gates([gates for _, gates in parts]),
        {task.name: labels[:, column] for column, task in enumerate(run.tasks)},
        _ids(batches, item),
        _ids(batches, category),
        lambda number: names_by_vocabulary(run, category, np.array([number]))[0] if category else "",
    )


def _features(manifest: LogManifest) -> tuple[str, str]:
    """The feature that tells items apart best, and the one with the most ids of which items share many."""
    sizes = {
        name: info.rows
        for name, info in manifest.features.items()
        if info.of_candidates and not info.multi and info.encoder is None
    }
    if not sizes:
        return "", ""
    item = max(sizes, key=lambda name: sizes[name])
    coarser = {name: rows for name, rows in sizes.items() if rows * _FEWEST <= sizes[item]}
    return item, max(coarser, key=lambda name: coarser[name], default="")


def _ids(batches: Sequence[RequestBatch], feature: str) -> npt.NDArray[np.int64]:
    if not feature:
        return np.zeros(sum(batch.candidates for batch in batches), dtype=np.int64)
    return np.concatenate([first_ids(batch, feature)[1].numpy() for batch in batches])


def _figures(label: str, found: _Found, end: str) -> Iterator[Figure | Table]:
    yield _distances(label, found, end)
    if len(found.spaces) > 1:
        yield _correlations(label, found, end)
    if found.gates:
        yield _gates(label, found, end)
    neighbourhood = _neighbourhood(label, found, end)
    if neighbourhood is not None:
        yield neighbourhood


def _distances(label: str, found: _Found, end: str) -> Figure:
    groups = pair_groups(found.labels)
    values = {
        name: [mean_with_interval(space.cosines()[chosen]) for chosen in groups.values()]
        for name, space in found.spaces.items()
    }
    mean, low, high = (
        {name: [each[place] for each in of_groups] for name, of_groups in values.items()}
        for place in range(3)
    )
    sizes = ", ".join(f"{name} {int(chosen.sum()):,}" for name, chosen in groups.items())
    return Figure(
        f"entanglement-distances{end}",
        f"How near users and items are in the spaces of {label}",
        "The mean cosine of the user's and the item's vector in each space, for candidates that tasks "
        "agree and disagree about (one task: that it likes and does not like), with 95 % intervals that "
        f"take candidates as independent. Candidates: {sizes}. Spaces are disentangled where the bars of "
        "the pairs that tasks disagree about differ between spaces.",
        (Bars("user and item", "cosine", tuple(groups), mean, low, high),),
    )


def _correlations(label: str, found: _Found, end: str) -> Figure:
    names = tuple(found.spaces)
    items, users = (
        [
            [correlation(getattr(one, side), getattr(other, side)) for other in found.spaces.values()]
            for one in found.spaces.values()
        ]
        for side in ("item", "user")
    )
    count = len(found.items)
    return Figure(
        f"entanglement-correlations{end}",
        f"How alike the spaces of {label} are",
        "The mean size of Pearson's correlation of a dimension of one space with a dimension of another, "
        f"over the {count:,} candidates of the sample; left of items' vectors, right of users'. "
        f"Independent spaces have about {(2 / np.pi / max(count, 1)) ** 0.5:.3f}; a space with itself has "
        "its own redundancy, its diagonal of ones included.",
        (HeatMap("items", "", "", names, names, items), HeatMap("users", "", "", names, names, users)),
    )


def _gates(label: str, found: _Found, end: str) -> Figure:
    names = tuple(found.gates)
    experts = tuple(dict.fromkeys(expert for gate in found.gates.values() for expert in gate.weights))
    weights = [[gate.weights.get(expert, np.nan) for expert in experts] for gate in found.gates.values()]
    most = [float(np.log(len(gate.weights))) for gate in found.gates.values()]
    entropies = {"entropy": [gate.entropy for gate in found.gates.values()], "all experts alike": most}
    return Figure(
        f"entanglement-gates{end}",
        f"What the gates of {label} use",
        "Left: the mean weight that each gate (rows: layer and task) gives each expert (columns: owner "
        "and number); empty where a gate does not see an expert. Right: the mean entropy of its weights "
        "for one candidate, beside that of equal weights. No entropy: the gate has chosen one expert; the "
        "largest: it does not choose.",
        (
            HeatMap("mean weight", "expert", "gate", experts, names, weights),
            Bars("entropy of a gate", "nats", names, entropies),
        ),
    )


def _neighbourhood(label: str, found: _Found, end: str) -> Figure | None:
    """Items of the category with the most distinct ones; None where it has too few."""
    pairs = np.unique(np.stack([found.categories, found.items], axis=1), axis=0)
    ids, counts = np.unique(pairs[:, 0], return_counts=True)
    category = int(ids[counts.argmax()])
    (inside,) = np.nonzero(found.categories == category)
    _, first, number = np.unique(found.items[inside], return_index=True, return_inverse=True)
    if len(first) < _FEWEST:
        return None
    first = inside[first]
    task, labels = next(iter(found.labels.items()))
    known = ~np.isnan(labels[inside])
    seen = np.bincount(number[known], minlength=len(first))
    liked = np.bincount(number[known], weights=labels[inside][known] > 0, minlength=len(first))
    rate = np.divide(liked, seen, out=np.zeros(len(first)), where=seen > 0)
    often = np.argsort(-seen, kind="stable")[:_ITEMS]
    above = rate[often] > np.median(rate[often])
    charts = []
    for name, space in found.spaces.items():
        where, shares = principal(space.item[first[often]])
        clouds = {
            f"{task} more often": (where[above, 0], where[above, 1]),
            f"{task} less often": (where[~above, 0], where[~above, 1]),
        }
        x_label, y_label = (
            f"component {place + 1} ({share:.0%} of the variance)" for place, share in enumerate(shares)
        )
        charts.append(Points(name, x_label, y_label, clouds))
    of = f"{found.name_of(category)}, the category with the most items," if len(ids) > 1 else "the sample"
    return Figure(
        f"entanglement-neighbourhood{end}",
        f"One neighbourhood in the spaces of {label}",
        f"The {len(often)} most shown items of {of} by the first two principal components of their vectors "
        f"in each space. Colours part them at the median of their rate of {task} in the sample. A space that "
        "knows the task shows two clouds.",
        tuple(charts),
    )


def _findings(label: str, found: _Found, end: str) -> Iterator[Finding]:
    yield from _apart(label, found, end)
    for name, gate in found.gates.items():
        if gate.entropy < _ONE_EXPERT and len(gate.weights) > 1:
            most = max(gate.weights, key=lambda expert: gate.weights[expert])
            used = f"uses one expert at a time (mostly {most}): entropy {gate.entropy:.3f} nats"
            text = f"{label}: gate {name} {used}"
            yield Finding("notice", text, f"entanglement-gates{end}")
    for expert in _unused(found.gates):
        text = f"{label}: no gate gives expert {expert} more than {_UNUSED:.0%} of its weight"
        yield Finding("notice", text, f"entanglement-gates{end}")


def _apart(label: str, found: _Found, end: str) -> Iterator[Finding]:
    """Where the pairs that the first two tasks disagree about are told apart most, and where least."""
    groups = pair_groups(found.labels)
    if len(groups) < 4 or len(found.spaces) < 2:
        return
    names = [name for name in groups if name.endswith(" alone")]
    apart: dict[str, float] = {}
    for name, space in found.spaces.items():
        one, other = (mean_with_interval(space.cosines()[groups[each]])[0] for each in names)
        apart[name] = one - other
    # A task that is a part of the other, as a conversion of a click, is never alone.
    if all(map(math.isfinite, apart.values())):
        low, high = (choose(apart, key=lambda name: apart[name]) for choose in (min, max))
        text = (
            f"{label}: pairs of “{names[0]}” are nearer than those of “{names[1]}” by {apart[high]:+.3f} in "
            f"{high} and by {apart[low]:+.3f} in {low}"
        )
        yield Finding("notice", text, f"entanglement-distances{end}")


def _unused(gates: Mapping[str, Gate]) -> list[str]:
    most: dict[str, float] = {}
    for name, gate in gates.items():
        layer = name.split("/")[0]
        for expert, weight in gate.weights.items():
            key = f"{layer}/{expert}"
            most[key] = max(most.get(key, 0.0), weight)
    return [expert for expert, weight in most.items() if weight < _UNUSED]
