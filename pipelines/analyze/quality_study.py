"""What the section on quality measures: runs of one log, on the same candidates and draws of users."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError, TandemError
from pipelines.analyze.scores import RunScores, common
from trainer.analysis.calibration import CalibrationBin, calibration_curve
from trainer.analysis.candidate_facts import behavior_ages, item_frequency
from trainer.analysis.slices import (
    Measured,
    Slicing,
    TaskCandidates,
    by_age,
    by_domain,
    by_frequency,
    by_history,
    measured,
)
from trainer.quality.bootstrap import UserDraws
from trainer.quality.domains import domain_names
from trainer.quality.metrics import group_keys
from trainer.quality.ranking import Ints
from trainer.quality.scored import Scored

WHOLE = ("", 0)
Part = tuple[str, int]
"""The name of a slicing and the number of one of its parts; `WHOLE` for all candidates."""


@dataclass(frozen=True)
class Study:
    """The runs of one log, measured on the same candidates.

    Attributes:
        scores: of each run, the candidates that all have. of: how many candidates any of them has.
        tasks: that some run has scores of, in order; slicings: of the candidates.
        found: (label, task) -> part -> what was measured, a run of that label each. Parts without a
            candidate that has a label are left out.
        curves: (label, task) -> calibration curve of the first run of that label.
        skipped: what could not be measured, and why.
    """

    scores: tuple[RunScores, ...]
    of: int
    draws: UserDraws
    tasks: tuple[str, ...]
    slicings: tuple[Slicing, ...]
    found: dict[tuple[str, str], dict[Part, list[Measured]]]
    curves: dict[tuple[str, str], list[CalibrationBin]]
    skipped: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(each.run.label for each in self.scores))

    def steps(self, label: str) -> list[int]:
        """How long the runs of a label were trained."""
        return [each.run.step for each in self.scores if each.run.label == label]

    def comparable(self, task: str) -> bool:
        """Whether all runs that have a task have the same labels of it."""
        own = [each.scored for each in self.scores if task in each.scored.tasks]
        first = _label(own[0], task)
        return all(np.array_equal(first, _label(other, task), equal_nan=True) for other in own[1:])


def study(scores: Sequence[RunScores], seed: int) -> Study:
    """Measure all runs, tasks and slices; `scores`: of runs of one log.

    Raises:
        DataError: no candidate has scores of all runs.
    """
    kept, of = common(scores)
    if of and not kept[0].scored.size:
        sources = "; ".join(f"{each.source} ({each.run.name})" for each in scores)
        problem = "the runs have scored no candidate in common; evaluate each of them on the whole split"
        raise DataError(f"{problem}: {sources}", file=scores[0].run.config.data.log)
    first = kept[0].scored
    users, groups = group_keys(first.user_id), group_keys(first.user_id, first.request_id)
    draws = UserDraws(int(users.max(initial=-1)) + 1, seed=seed)
    slicings, skipped = _slicings(kept)
    tasks = tuple(dict.fromkeys(task for each in kept for task in each.scored.tasks))
    found: dict[tuple[str, str], dict[Part, list[Measured]]] = {}
    curves: dict[tuple[str, str], list[CalibrationBin]] = {}
    for each in kept:
        for task in each.scored.tasks:
            key = each.run.label, task
            candidates, sliced = _observed(each.scored, task, groups, users, slicings)
            parts = dict(_parts(candidates, sliced))
            for part, own in zip(parts, measured([*parts.values()], draws), strict=True):
                found.setdefault(key, {}).setdefault(part, []).append(own)
            if key not in curves:
                curves[key] = calibration_curve(candidates, draws)
    return Study(tuple(kept), of, draws, tasks, slicings, found, curves, skipped)


def _label(scored: Scored, task: str) -> npt.NDArray[np.float32]:
    label: npt.NDArray[np.float32] = scored.label[:, scored.tasks.index(task)]
    return label


def _observed(
    scored: Scored, task: str, groups: Ints, users: Ints, slicings: Sequence[Slicing]
) -> tuple[TaskCandidates, list[Slicing]]:
    """The candidates that have a label of a task, and which parts they belong to."""
    place = scored.tasks.index(task)
    known = ~np.isnan(scored.label[:, place])
    score, label = (each[known, place].astype(np.float64) for each in (scored.score, scored.label))
    candidates = TaskCandidates(score, label, groups[known], users[known])
    return candidates, [slicing.only(known) for slicing in slicings]


def _parts(candidates: TaskCandidates, slicings: Sequence[Slicing]) -> Iterator[tuple[Part, TaskCandidates]]:
    yield WHOLE, candidates
    for slicing in slicings:
        for number in range(len(slicing.parts)):
            if (chosen := slicing.of == number).any():
                yield (slicing.name, number), candidates.part(chosen)


def _slicings(scores: Sequence[RunScores]) -> tuple[tuple[Slicing, ...], tuple[str, ...]]:
    """-> (divisions of the candidates, which all runs share; why some are missing)."""
    # The run that sees most of a history tells most about its length.
    longest = max(scores, key=lambda each: each.run.config.data.history_length)
    made: list[Slicing] = [by_history(longest.scored.history)]
    skipped = []
    for slice_by in (_by_age, _by_frequency, _by_domain):
        try:
            slicing = slice_by(scores)
        except TandemError as error:
            skipped.append(f"slices {_WORDS[slice_by]}: {error}")
        else:
            made += [slicing] if isinstance(slicing, Slicing) else []
            skipped += [slicing] if isinstance(slicing, str) else []
    return tuple(made), tuple(skipped)


def _by_age(scores: Sequence[RunScores]) -> Slicing | str:
    run, scored, split = scores[0].run, scores[0].scored, scores[0].split
    return by_age(behavior_ages(run.config.data, run.manifest, split, scored.user_id, scored.request_id))


def _by_frequency(scores: Sequence[RunScores]) -> Slicing | str:
    run, items = scores[0].run, scores[0].scored.item_id
    if (items == -1).all():
        return "slices by item frequency need a feature `item_id` of candidates, with one id each"
    # Raw ids are numbers like any other.
    unknown = None if run.manifest.features["item_id"].raw else items == 0
    return by_frequency(item_frequency(run.config.data, run.manifest, items), unknown)


def _by_domain(scores: Sequence[RunScores]) -> Slicing | str | None:
    for each in scores:
        if (domain := each.scored.domain) is not None:
            data = each.run.config.data
            names, problem = domain_names(data.log, data.domain, domain)
            return by_domain(domain, names) if not problem else by_domain(domain, {})
    return None


_WORDS: dict[Callable[..., object], str] = {
    _by_age: "by the age of the newest behavior",
    _by_frequency: "by item frequency",
    _by_domain: "by domain",
}
