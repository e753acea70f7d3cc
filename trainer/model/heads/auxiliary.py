"""A second loss on the main branch's whole window, beside the loss on the kept behaviors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.heads.head import Perceptron
from trainer.model.read.sequence import Behaviors
from trainer.model.windows import pooled_windows


class Auxiliary(nn.Module):
    """Logits of a small head over what is made of the whole window.

    Args:
        width: of all parts together; model: its settings; tasks: T.
    """

    def __init__(self, width: int, model: Any, tasks: int) -> None:
        super().__init__()
        self.head = Perceptron(width, model.auxiliary_hidden, tasks, model.norm)

    @classmethod
    def build(cls, model: Any, width: int, tasks: int) -> Auxiliary:
        """`width`: D of the representation."""
        raise NotImplementedError

    @classmethod
    def problem(cls, model: Any) -> str:
        """What is wrong with a model that has this loss; empty if nothing is."""
        return ""

    def parts(self, branch: Any, behaviors: Behaviors) -> list[Tensor]:
        """What the head is given.

        Args:
            branch: the main `trainer.model.branch.Branch`, which stands above this module.
            behaviors: the whole window of every candidate.
        """
        raise NotImplementedError

    def forward(self, branch: Any, behaviors: Behaviors) -> Tensor:
        """-> logits [C, T]; `branch`: the main one, and what it read."""
        logits: Tensor = self.head(self.parts(branch, behaviors.with_whole_windows()))
        return logits


class SoftmaxLoss(Auxiliary):
    """By the branch's own scores and sequence model over all L behaviors (DARE's code)."""

    @classmethod
    def build(cls, model: Any, width: int, tasks: int) -> SoftmaxLoss:
        return cls(width * (3 if model.target_aware else 2), model, tasks)

    @classmethod
    def problem(cls, model: Any) -> str:
        fits = model.sequence == "attention" and model.heads == 1
        return "" if fits else 'auxiliary = "softmax" needs sequence = "attention" with one head'

    def parts(self, branch: Any, behaviors: Behaviors) -> list[Tensor]:
        weight_CHX = branch.weigh(behaviors)
        parts: list[Tensor] = branch.sequence(behaviors, weight_CHX)
        return parts


class IndexLoss(Auxiliary):
    """By the raw inner products r of SIM's soft search, whose index only this loss trains.

    Its head is given [v_t ; sum_i r_i e_i].
    """

    @classmethod
    def build(cls, model: Any, width: int, tasks: int) -> IndexLoss:
        return cls(2 * width, model, tasks)

    @classmethod
    def problem(cls, model: Any) -> str:
        fits = model.search_kind.auxiliary == "index"
        return "" if fits else 'auxiliary = "index" goes with search = "soft", and search = "soft" with it'

    def parts(self, branch: Any, behaviors: Behaviors) -> list[Tensor]:
        index: Any = branch.search
        windows = behaviors.windows
        score_CX = index.index.over_windows(index.index.encode(behaviors.raw), windows)[:, 0]
        weight_CX = torch.where(behaviors.selection.mask, score_CX, 0.0)
        return [behaviors.target_CD, pooled_windows(behaviors.value_SD, behaviors.place, windows, weight_CX)]
