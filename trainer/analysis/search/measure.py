"""What is measured of one run's search: batch by batch, then put together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from trainer.analysis.search.discriminability import pooled_vectors
from trainer.analysis.search.information import Floats, Ints, Truth, window_ids
from trainer.analysis.search.kept import Recall, kept_behaviors, kept_places, measure
from trainer.analysis.search.ranking import (
    Bools,
    Quality,
    Ranking,
    obstacle,
    quality,
    rank,
    references,
    wanted_by_place,
)
from trainer.analysis.search.relevance import LearnedRelevance
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.model.windows import first_ids

# The run's own ranking, beside the names of `references`.
OWN = ""


@dataclass
class Tally:
    """The quality of one ranking by one truth, of all batches.

    Attributes:
        targets, parts: of each batch; places: of `wanted_by_place`, of all.
    """

    targets: list[Ints] = field(default_factory=list)
    parts: list[Quality] = field(default_factory=list)
    places: Ints | None = None

    def add(self, ranking: Ranking, truth: Truth) -> None:
        """Measure a batch."""
        gain = truth.of(ranking.target, ranking.window)
        self.targets.append(ranking.target)
        self.parts.append(quality(ranking, gain))
        places = wanted_by_place(ranking, gain, truth.bins)
        self.places = places if self.places is None else self.places + places

    def mean(self, name: str) -> float:
        """Over the candidates that have the measure; NaN where none has."""
        return _mean(np.concatenate([getattr(part, name) for part in self.parts]))

    def mean_of_category(self, name: str, category: int) -> float:
        """Over those of one target category."""
        values = np.concatenate([getattr(part, name) for part in self.parts])
        return _mean(values[np.concatenate(self.targets) == category])

    def recall_by_place(self) -> Floats:
        """The share of the most informative behaviors of each bin of places that is kept; NaN without any."""
        assert self.places is not None
        wanted, kept = self.places
        with np.errstate(invalid="ignore"):
            return np.asarray(kept / wanted)


@dataclass
class SearchMeasures:
    """What was measured of one run.

    Attributes:
        obstacle: why there is no one order of behaviors, see `obstacle`; then `tallies` and `learned` are
            empty.
        tallies: truth -> ranking (`OWN` or a reference) -> its quality; candidates: how many were ranked.
        kept: truth -> the share of information that is kept, whatever keeps it.
        learned: the scores by category and place.
        vectors, labels: pooled vectors [n, D] of candidates, and their labels.
        k: K.
    """

    obstacle: str
    tallies: dict[str, dict[str, Tally]]
    kept: dict[str, Recall]
    learned: LearnedRelevance
    vectors: Floats
    labels: Ints
    k: int
    candidates: int = 0


def measure_search(
    model: TwoStageModel,
    batches: Iterable[tuple[RequestBatch, RequestBatch]],
    truths: Mapping[str, Truth],
    feature: str,
    learned: LearnedRelevance,
    enough: int,
    beside: bool = True,
    seed: int = 0,
) -> SearchMeasures:
    """Measure a model on some batches.

    Args:
        model: in eval mode, without a hard search in the data path.
        batches: as they were read, and with the ids that the model knows.
        truths: by name, at least one; feature: that classes behaviors; learned: to be added to.
        enough: only candidates count whose category the truth has seen so often.
        beside: whether the references are measured, too; seed: of the random one.
    """
    random = np.random.default_rng(seed)
    problem = obstacle(model)
    tallies: dict[str, dict[str, Tally]] = {name: defaultdict(Tally) for name in truths}
    kept: dict[str, list[tuple[Floats, Bools]]] = {name: [] for name in truths}
    vectors, labels, counted = [], [], 0
    often = next(iter(truths.values())).shown >= enough
    for batch, known in batches:
        vectors.append(pooled_vectors(model, known))
        labels.append(batch.labels[:, 0].numpy())
        for name, part in _kept(model, batch, known, truths, feature, often).items():
            kept[name].append(part)
        if problem:
            continue
        ranking = rank(model, batch, feature, known)
        ranking = ranking.part(often[ranking.target])
        counted += len(ranking.target)
        learned.add(ranking)
        for name, each in {OWN: ranking, **(references(ranking, random) if beside else {})}.items():
            for place, truth in truths.items():
                tallies[place][name].add(each, truth)
    label = np.concatenate(labels)
    there = ~np.isnan(label)
    (main, *_) = model.branches.named().values()
    return SearchMeasures(
        problem,
        {name: dict(each) for name, each in tallies.items()},
        {name: measure(parts) for name, parts in kept.items() if any(part[0].any() for part in parts)},
        learned,
        np.concatenate(vectors)[there],
        (label[there] > 0).astype(np.int64),
        main.settings.k,
        counted,
    )


def _kept(
    model: TwoStageModel,
    batch: RequestBatch,
    known: RequestBatch,
    truths: Mapping[str, Truth],
    feature: str,
    often: Bools,
) -> dict[str, tuple[Floats, Bools]]:
    """Truth -> the information of each visible behavior [C, X], and whether it is kept."""
    ids_N, ids_C = first_ids(batch, feature)
    window = window_ids(batch, ids_N, model.branches.history_length)[batch.candidate_request.numpy()]
    target = ids_C.numpy()
    index, mask = (part.cpu().numpy() for part in kept_behaviors(model, known))
    kept = kept_places(batch, index, mask, window.shape)
    chosen = often[target]
    return {name: (truth.of(target, window)[chosen], kept[chosen]) for name, truth in truths.items()}


def _mean(values: Floats) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
