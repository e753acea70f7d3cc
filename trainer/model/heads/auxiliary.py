"""A second loss on the main branch's whole window, beside that of the model's own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from trainer.config.model import ModelKeys
from trainer.data.batch import RequestBatch
from trainer.model.heads.head import Perceptron
from trainer.model.heads.owned import columns
from trainer.model.read.sequence import Behaviors
from trainer.model.windows import pooled_windows


class AuxiliarySizes(NamedTuple):
    """What an auxiliary head is built from, besides the model's settings.

    Attributes:
        shared: D of the shared sets of the main branch's representation together; parts: width of all that
            its sequence models make of them.
        attention: width of its attention vectors.
        tasks: names of those with a tower.
    """

    shared: int
    parts: int
    attention: int
    tasks: Sequence[str]


class Auxiliary(nn.Module):
    """What is made of the main branch's whole window in training, and what must be known of it.

    Attributes:
        keys: the settings class of a model, or a subclass of it with the keys that this one adds.
        reads_representation: of all behaviors of the window, in the shared sets.
        retrieves: it gives a `trainer.model.heads.retrieval.Retrieved`; the others give logits [C, T].
        owner: the task that alone trains it; empty: all tasks do.
    """

    keys: ClassVar[type[ModelKeys]] = ModelKeys
    reads_representation: ClassVar[bool] = True
    retrieves: ClassVar[bool] = False
    owner: str = ""

    @classmethod
    def build(cls, model: Any, sizes: AuxiliarySizes) -> Auxiliary:
        raise NotImplementedError

    @classmethod
    def problem(cls, model: Any) -> str:
        """What is wrong with a model that has this loss; empty if nothing is."""
        return ""

    @classmethod
    def features(cls, model: Any) -> dict[str, str]:
        """Key -> the feature that it names, of which every candidate has one id in the log."""
        return {}

    def forward(self, batch: RequestBatch, branch: Any, behaviors: Behaviors, live: Sequence[bool]) -> Any:
        """-> logits or `Retrieved`.

        Args:
            branch: the main `trainer.model.branch.Branch`, which stands above this module; behaviors: what
                it read.
            live: of each task, whether its loss reaches the branch's attention weights.
        """
        raise NotImplementedError


class WindowLoss(Auxiliary):
    """Logits of a small head over what is made of the whole window.

    All tasks train it together, so of several sets of the representation it reads those that are shared.

    Args:
        width: of all parts together; model: its settings; tasks: T.
    """

    def __init__(self, width: int, model: Any, tasks: int) -> None:
        super().__init__()
        self.head = Perceptron(width, model.auxiliary_hidden, tasks, model.norm)

    def weigh(self, branch: Any, behaviors: Behaviors) -> Tensor:
        """Weights of the behaviors of every window, [C, *, X]."""
        raise NotImplementedError

    def parts(self, branch: Any, behaviors: Behaviors, weight: Tensor) -> list[Tensor]:
        """What the head is given.

        Args:
            branch: the main one.
            behaviors: the whole window of every candidate, in the shared sets; weight: of `weigh`.
        """
        raise NotImplementedError

    def forward(self, batch: RequestBatch, branch: Any, behaviors: Behaviors, live: Sequence[bool]) -> Tensor:
        """-> logits [C, T]."""
        behaviors = branch.shared(behaviors.with_whole_windows())
        weight = self.weigh(branch, behaviors)
        logits: Tensor = self.head(self.parts(branch, behaviors, weight))
        if all(live):
            return logits
        stopped: Tensor = self.head(self.parts(branch, behaviors, weight.detach()))
        return columns([stopped, logits], [int(each) for each in live])


class SoftmaxLoss(WindowLoss):
    """By the branch's own scores and sequence model over all L behaviors (DARE's code)."""

    @classmethod
    def build(cls, model: Any, sizes: AuxiliarySizes) -> SoftmaxLoss:
        return cls(sizes.parts, model, len(sizes.tasks))

    @classmethod
    def problem(cls, model: Any) -> str:
        fits = model.sequence == "attention" and model.heads == 1
        return "" if fits else 'auxiliary = "softmax" needs sequence = "attention" with one head'

    def weigh(self, branch: Any, behaviors: Behaviors) -> Tensor:
        weight_CHX: Tensor = branch.weigh(behaviors)
        return weight_CHX

    def parts(self, branch: Any, behaviors: Behaviors, weight: Tensor) -> list[Tensor]:
        sets: dict[str, list[Tensor]] = branch.read(behaviors, weight, branch.shared_sets)
        return [part for parts in sets.values() for part in parts]


class IndexLoss(WindowLoss):
    """By the raw inner products r of SIM's soft search, whose index only this loss trains.

    Its head is given [v_t ; sum_i r_i e_i].
    """

    @classmethod
    def build(cls, model: Any, sizes: AuxiliarySizes) -> IndexLoss:
        return cls(2 * sizes.shared, model, len(sizes.tasks))

    @classmethod
    def problem(cls, model: Any) -> str:
        fits = model.search_kind.auxiliary == "index"
        return "" if fits else 'auxiliary = "index" goes with search = "soft", and search = "soft" with it'

    def weigh(self, branch: Any, behaviors: Behaviors) -> Tensor:
        index = branch.search.index
        score_CX: Tensor = index.over_windows(index.encode(behaviors.raw), behaviors.windows)[:, 0]
        return torch.where(behaviors.selection.mask, score_CX, 0.0)

    def parts(self, branch: Any, behaviors: Behaviors, weight: Tensor) -> list[Tensor]:
        pooled = pooled_windows(behaviors.value_SD, behaviors.place, behaviors.windows, weight)
        return [behaviors.target_CD, pooled]
