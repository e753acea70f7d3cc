"""How sure a model is of a logit: a Gaussian posterior of the last linear map of each task.

The logit of a task is w . phi, where the head makes phi of a candidate, with a 1 for the bias. Everything
below the last map is taken for known. `trainer.snapshot.laplace` finds the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from trainer.config.tasks import TaskConfig
from trainer.config.toml import Settings
from trainer.model.settings import ModelConfig

LACKING = "cannot say how sure it is; export it with --uncertainty"


class TaskUncertainty(Settings):
    """Of one task's posterior: the numbers of its phi, the bias with them; the precision of its prior; and
    how many candidates with its label it was made of."""

    width: int = Field(ge=1, le=65_536)
    prior: float = Field(gt=0, allow_inf_nan=False)
    labelled: int = Field(ge=1)


class Uncertainty(Settings):
    """What posteriors of the last maps were made of.

    Attributes:
        candidates: of the training split that were looked at; of: those that it has.
        tasks: in the order of the manifest's tasks.
    """

    candidates: int = Field(ge=1)
    of: int = Field(ge=1)
    tasks: dict[str, TaskUncertainty]


def last_layer_obstacle(model: ModelConfig, tasks: Mapping[str, TaskConfig]) -> str:
    """Why a model's tasks have no posteriors; empty if they can."""
    made = [name for name, task in tasks.items() if task.product]
    if made:
        return f"the task {made[0]!r} is a product of others, and has no last map"
    return model.head_kind.last_layer_obstacle(model)


def with_one(features_CW: Tensor) -> Tensor:
    """phi, [C, W + 1]: what the last map is given, and the 1 that its bias is multiplied by."""
    return torch.cat([features_CW, features_CW.new_ones(features_CW.shape[0], 1)], dim=1)


@dataclass(frozen=True)
class Posterior:
    """Of the weights of one task, the bias last.

    Attributes:
        root: float32 [D, D], lower triangular with a positive diagonal: the covariance is root root^T.
    """

    root: Tensor

    def spread(self, phi_CD: Tensor) -> Tensor:
        """phi^T root, [C, D]: a logit is its mean and this times D independent normal numbers.

        Its norm is the standard deviation of the logit.
        """
        return phi_CD @ self.root


def probability(mean: Tensor, deviation: Tensor) -> Tensor:
    """The mean of sigmoid(logit), nearly: sigmoid(mean / sqrt(1 + pi / 8 deviation^2)) (MacKay 1992)."""
    return (mean / (1 + math.pi / 8 * deviation.square()).sqrt()).sigmoid()


@dataclass(frozen=True)
class Judgement:
    """What a snapshot with posteriors says of C candidates and T tasks.

    Attributes:
        mean, deviation: [C, T], of the logit.
        spread: of each task, [C, D], see `Posterior.spread`.
    """

    mean: Tensor
    deviation: Tensor
    spread: Sequence[Tensor]

    @staticmethod
    def of(logits_CT: Tensor, phi: Sequence[Tensor], posteriors: Mapping[str, Posterior]) -> Judgement:
        """`phi`: of each task, [C, D]; `posteriors`: of the tasks, in their order."""
        spread = [own.spread(phi_CD) for own, phi_CD in zip(posteriors.values(), phi, strict=True)]
        return Judgement(logits_CT, torch.stack([each.norm(dim=1) for each in spread], dim=1), spread)

    @property
    def probability(self) -> Tensor:
        """[C, T], with the deviation in it."""
        return probability(self.mean, self.deviation)

    def bounds(self, factor: float) -> Tensor:
        """Upper confidence bounds of the logits, [C, T]: mean + factor deviation."""
        return self.mean + factor * self.deviation

    def drawn(self, candidates: slice, rng: np.random.Generator) -> Tensor:
        """Logits by one draw of all tasks' weights, for some candidates, [c, T] (Thompson sampling).

        Candidates that are alike have logits that are alike in every draw.
        """
        columns = []
        for spread_CD in self.spread:
            normal_D = torch.from_numpy(rng.standard_normal(spread_CD.shape[1], dtype=np.float32))
            columns.append(spread_CD[candidates] @ normal_D)
        return self.mean[candidates] + torch.stack(columns, dim=1)
