"""Whether the spaces of a model hold different interests, or all the same.

A *space* is what the vectors of one set, or of one role, live in. Of each candidate it has an item's vector
(the candidate's own) and a user's (the weighted sum of the kept behaviors). In a disentangled model, pairs
that one task likes and another does not are near in the space of the one and far in that of the other; in an
entangled one all spaces say the same ("Ads Recommendation in a Collapsed and Entangled World", section 4;
STEM).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.analysis.readings import places_of, pooled_of, weighted_sum, weights_of
from trainer.data.batch import RequestBatch
from trainer.model.branch import Reading
from trainer.model.frame import TwoStageModel
from trainer.model.heads.experts import ExpertsHead

Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class Space:
    """Attributes: user, item: the vectors of C candidates, [C, D]."""

    user: Floats
    item: Floats

    def cosines(self) -> Floats:
        """Of user and item, [C]; NaN where one of them is zero."""
        lengths = np.linalg.norm(self.user, axis=1) * np.linalg.norm(self.item, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((self.user * self.item).sum(1) / np.where(lengths > 0, lengths, np.nan))


@dataclass(frozen=True)
class Gate:
    """What a gate did: the mean weight of each expert, and the mean entropy in nats; of `candidates`."""

    weights: dict[str, float]
    entropy: float
    candidates: int


def spaces_of(model: TwoStageModel, batch: RequestBatch) -> tuple[dict[str, Space], dict[str, Gate]]:
    """The spaces of a batch by name, and its gates.

    Names are those of roles and sets, `attention` and `representation / SET`, behind that of the branch where
    there are several. Attention has no space of its own where it shares its tables with the representation,
    nor a space at all where user and item have vectors of different widths.

    Args:
        model: in eval mode; batch: with the ids that it knows.
    """
    pooled = pooled_of(model, batch)
    spaces: dict[str, Space] = {}
    for name, reading in pooled.of_branch.items():
        front = f"{name}: " if len(pooled.of_branch) > 1 else ""
        spaces |= {front + space: found for space, found in _of_branch(reading).items()}
    gates: dict[str, Gate] = {}
    if isinstance(model.head, ExpertsHead):
        for name, report in model.head.gate_reports(pooled.given[0]).items():
            gates[name] = Gate(report.weights, report.entropy, batch.candidates)
    return spaces, gates


def _of_branch(reading: Reading) -> dict[str, Space]:
    branch, behaviors = reading.branch, reading.behaviors
    roles, weight_CK = branch.settings.roles, weights_of(reading)
    spaces = {}
    apart = roles.attention_behavior != roles.representation_behavior
    raw = behaviors.raw
    if apart and reading.weight_CHK is not None and raw.query_CD.shape[1] == raw.key_ND.shape[1] > 0:
        user = weighted_sum(raw.key_ND, behaviors.selection.index, weight_CK)
        spaces["attention"] = Space(user, raw.query_CD.detach().cpu().numpy())
    for name, of_set in zip(branch.widths, behaviors.by_set(list(branch.widths.values())), strict=True):
        if of_set.target_CD.shape[1] == of_set.value_SD.shape[1]:
            user = weighted_sum(of_set.value_SD, places_of(reading), weight_CK)
            title = f"representation / {name}" if name else "representation"
            spaces[title] = Space(user, of_set.target_CD.detach().cpu().numpy())
    return spaces


def joined(parts: list[dict[str, Space]]) -> dict[str, Space]:
    """The spaces of several batches as one."""
    return {
        name: Space(
            np.concatenate([part[name].user for part in parts]),
            np.concatenate([part[name].item for part in parts]),
        )
        for name in parts[0]
    }


def joined_gates(parts: list[dict[str, Gate]]) -> dict[str, Gate]:
    """The gates of several batches, each candidate counted alike."""
    found = {}
    for name in parts[0]:
        gates = [part[name] for part in parts]
        total = sum(gate.candidates for gate in gates)
        weights = {
            expert: sum(gate.weights[expert] * gate.candidates for gate in gates) / total
            for expert in gates[0].weights
        }
        found[name] = Gate(weights, sum(gate.entropy * gate.candidates for gate in gates) / total, total)
    return found


def correlation(one_CD: Floats, other_CE: Floats) -> float:
    """The mean of |Pearson's correlation| over all pairs of a column of one and a column of the other.

    Columns that are constant are left out; NaN where none is left. Of C independent vectors it is about
    sqrt(2 / (pi C)).
    """
    if not len(one_CD):
        return float("nan")
    a, b = _standardised(one_CD), _standardised(other_CE)
    if not (a.shape[1] and b.shape[1]):
        return float("nan")
    return float(np.abs(a.T @ b / len(a)).mean())


def _standardised(vectors: Floats) -> Floats:
    values = vectors.astype(np.float64)
    deviation = values.std(axis=0)
    kept = deviation > 1e-12
    return np.asarray((values[:, kept] - values[:, kept].mean(axis=0)) / deviation[kept])


def pair_groups(labels: Mapping[str, Floats]) -> dict[str, npt.NDArray[np.bool_]]:
    """Name of a group of candidates -> which they are, [C].

    With two tasks or more, those that the first two agree and disagree about; with one, those that it likes
    and those that it does not. Where a label was not observed, a candidate is in no group.
    """
    (first, one), *rest = labels.items()
    if not rest:
        return {first: one > 0, f"not {first}": one == 0}
    (second, other), *_ = rest
    return {
        f"{first} and {second}": (one > 0) & (other > 0),
        f"{first} alone": (one > 0) & (other == 0),
        f"{second} alone": (one == 0) & (other > 0),
        "neither": (one == 0) & (other == 0),
    }


def mean_with_interval(values: Floats) -> tuple[float, float, float]:
    """The mean and the ends of its 95 % interval, candidates taken as independent; NaN without any."""
    there = values[~np.isnan(values)]
    if not there.size:
        return (float("nan"),) * 3
    mean, half = float(there.mean()), float(1.96 * there.std() / np.sqrt(there.size))
    return mean, mean - half, mean + half


def principal(vectors: Floats) -> tuple[Floats, Floats]:
    """The first two principal components: coordinates [n, 2], and their shares of the variance [2].

    Signs are such that the largest coordinate by size is positive. Vectors that hold NaN or infinity have no
    part in it, and NaN for coordinates.
    """
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        coordinates = np.full((len(vectors), 2), np.nan)
        coordinates[finite], shares = principal(vectors[finite])
        return coordinates, shares
    if not len(vectors):
        return np.zeros((0, 2)), np.zeros(2)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    coordinates = np.zeros((len(vectors), 2))
    found = (left * values)[:, :2]
    coordinates[:, : found.shape[1]] = found
    largest = np.take_along_axis(coordinates, np.abs(coordinates).argmax(axis=0)[None], axis=0)
    shares = np.zeros(2)
    total = float((values**2).sum())
    if total > 0:
        shares[: found.shape[1]] = (values**2)[:2] / total
    return coordinates * np.where(largest < 0, -1.0, 1.0), shares
