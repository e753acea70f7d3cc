"""What each run measured on the test split, for every draw of its users; and differences of two models.

All runs of a log are measured by the same draws of users (`trainer.quality.bootstrap`), so that a difference
is paired by user, over the same candidates.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from embeddings.errors import DataError
from trainer.quality.bootstrap import METRICS, REPLICATES, Interval, Resampled, UserDraws, replicates
from trainer.quality.metrics import group_keys, measure
from trainer.quality.scored import Scored
from trainer.sealed_folder import replacing

Floats = npt.NDArray[np.float64]
DRAWS = "draws.npz"
# Of the draws of users, and of those of seeds, which follow from the same number.
SEED = 17


@dataclass(frozen=True)
class Drawn:
    """A run's values on one task of the test split.

    Attributes:
        value: [metrics], of all users, in the order of `METRICS`; drawn: [metrics, replicates].
        users: how many there are; candidates: a digest of who was scored, and of the labels.
    """

    value: Floats
    drawn: Floats
    users: int
    candidates: str


def drawn_of(scored: Scored, probable: bool = True, count: int = REPLICATES) -> dict[str, Drawn]:
    """Task -> its values.

    Args:
        scored: every candidate of the split. probable: scores are probabilities; of others only the order
            means something, and logloss and PCOC are NaN. count: how many replicates.
    """
    scored, found = scored.in_order(), {}
    for place, task in enumerate(scored.tasks):
        part = scored.observed(place)
        score, label = (each[:, place].astype(np.float64) for each in (part.score, part.label))
        groups, users = group_keys(part.user_id, part.request_id), group_keys(part.user_id)
        draws = UserDraws(int(users.max(initial=-1)) + 1, count, SEED)
        (drawn,) = replicates([Resampled.of(score, label, groups, users)], draws)
        whole = measure(score, label, groups, users)
        value = np.array([getattr(whole, metric) for metric in METRICS])
        every = np.stack([drawn[metric] for metric in METRICS])
        if not probable:
            only_order = [metric in ("logloss", "pcoc") for metric in METRICS]
            value[only_order], every[only_order] = np.nan, np.nan
        digest = hashlib.sha256()
        for column in (part.user_id, part.request_id, part.candidate, label):
            digest.update(np.ascontiguousarray(column).tobytes())
        found[task] = Drawn(value, every, draws.users, digest.hexdigest())
    return found


def write_drawn(drawn: dict[str, Drawn], run: Path) -> None:
    """Keep the values of a run in its folder."""
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for task, each in drawn.items():
        arrays |= {f"{task}/value": each.value, f"{task}/drawn": each.drawn}
        arrays |= {f"{task}/users": np.array(each.users), f"{task}/candidates": np.array(each.candidates)}
    with replacing(run / DRAWS) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_drawn(run: Path) -> dict[str, Drawn]:
    """The opposite of `write_drawn`.

    Raises:
        DataError: missing or damaged.
    """
    try:
        with np.load(run / DRAWS) as arrays:
            tasks = dict.fromkeys(name.rpartition("/")[0] for name in arrays.files)
            return {
                task: Drawn(
                    arrays[f"{task}/value"],
                    arrays[f"{task}/drawn"],
                    int(arrays[f"{task}/users"]),
                    str(arrays[f"{task}/candidates"]),
                )
                for task in tasks
            }
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"cannot be read: {error}; delete it, and it is made anew", file=run / DRAWS
        ) from None


@dataclass(frozen=True)
class Model:
    """All runs of one model on one task.

    Attributes:
        runs: seed -> what was measured; a line that no seed changes has one run.
        seeded: other seeds would give other runs.
    """

    name: str
    runs: dict[int, Drawn]
    seeded: bool = True

    def mean(self, metric: str) -> float:
        """Of all runs, by the name of a metric."""
        return float(np.mean([run.value[METRICS.index(metric)] for run in self.runs.values()]))


def difference(one: Model, other: Model, metric: str) -> Interval:
    """What one model has more than another, averaged over the seeds that both have, with a 95 % interval.

    A replicate draws users, and seeds with replacement. Of n seeds it draws n - 1, for the mean of n draws
    out of n values varies by (n - 1) / n too little (the bootstrap's bias, which is large for five). A model
    that no seed changes stands beside each run of the other. With one seed, the interval is of users alone.

    Raises:
        DataError: they have scored different candidates, or have no seed in common.
    """
    pairs = _pairs(one, other)
    at = METRICS.index(metric)
    values = np.array([a.value[at] - b.value[at] for a, b in pairs])
    drawn_SB = np.stack([a.drawn[at] - b.drawn[at] for a, b in pairs])
    seeds, count = drawn_SB.shape
    if seeds > 1:
        chosen_BS = np.random.default_rng([SEED, seeds]).integers(0, seeds, (count, seeds - 1))
        drawn_B = drawn_SB[chosen_BS, np.arange(count)[:, None]].mean(axis=1)
    else:
        drawn_B = drawn_SB[0]
    return Interval.of(float(values.mean()), drawn_B, pairs[0][0].users)


def _pairs(one: Model, other: Model) -> list[tuple[Drawn, Drawn]]:
    if one.seeded and other.seeded:
        seeds = [seed for seed in one.runs if seed in other.runs]
        pairs = [(one.runs[seed], other.runs[seed]) for seed in seeds]
    else:
        pairs = [(a, b) for a in one.runs.values() for b in other.runs.values()]
    if not pairs:
        raise DataError(f"{one.name} and {other.name} have no seed in common")
    if len({drawn.candidates for pair in pairs for drawn in pair}) > 1:
        raise DataError(f"{one.name} and {other.name} have scored different candidates, or other labels")
    return pairs


def ranking(models: Sequence[Model]) -> list[Model]:
    """By mean AUC, the best one first; those without an AUC last, in their order."""
    means = {model.name: model.mean("auc") for model in models}
    return sorted(models, key=lambda model: -np.nan_to_num(means[model.name], nan=-1.0))
