"""The space of two towers: the inner product of a user and an item is the model's logit."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.model.branch import at_least_one_row
from trainer.model.heads.head import DotHead
from trainer.model.read.sasrec import TargetDecoupledSasrec
from trainer.model.read.sequence import Behaviors
from trainer.snapshot.loading import Snapshot
from trainer.snapshot.retrieval.item_batch import looked_up
from trainer.snapshot.retrieval.spaces.space import Space, UserVectors


class TowersSpace(Space):
    """Of `sequence = "sasrec"` and `head = "dot"`: a user has a vector for each group of items.

    The head says: logit = scale <user, item> / sqrt(D) + <w, item> + <v, context> + b. So an item's vector is
    [item, <w, item> + b], a user's is [scale user / sqrt(D), 1], and <v, context> is the user's offset.
    """

    name = "towers"
    about = "the logit of the task, less the offset of the user's row"
    reads_task = True

    @classmethod
    def problem(cls, snapshot: Snapshot, branch: str, task: str) -> str:
        model = snapshot.model
        if not isinstance(model.head, DotHead):
            return f'head = "{model.config.head}" needs a candidate before it knows anything of a user'
        if model.numbers:
            return "its head reads numbers of candidates, which are no property of an item"
        if task not in _towers(snapshot):
            return f"task {task!r} has no tower of its own; take one of {', '.join(_towers(snapshot))}"
        return ""

    @property
    def scale(self) -> float:
        return float(self._head.scale[self._place]) * float(self._sequence.width**-0.5)

    @property
    def group_feature(self) -> str:
        return str(self.branch.settings.time_group)

    @property
    def _place(self) -> int:
        return _towers(self.snapshot).index(self.task)

    @property
    def _head(self) -> DotHead:
        assert isinstance(self.model.head, DotHead)
        return self.model.head

    @property
    def _sequence(self) -> TargetDecoupledSasrec:
        assert isinstance(self.branch.sequence, TargetDecoupledSasrec)
        return self.branch.sequence

    def items(self, batch: RequestBatch) -> Tensor:
        item_CD = looked_up(self.snapshot, self.branch.settings.roles.representation_target, batch)
        item_CD = item_CD[batch.behaviors :]
        layer = self._head.item
        own_C = item_CD @ layer.weight[self._place, : item_CD.shape[1]] + layer.bias[self._place]
        return torch.cat([item_CD, own_C[:, None]], dim=1)

    def users(self, batch: RequestBatch) -> UserVectors:
        roles = self.branch.settings.roles
        retrieval = self.model.retrieve(batch)[self.branch_name]
        value_ND = looked_up(self.snapshot, roles.representation_behavior, batch)[: batch.behaviors]
        behaviors = Behaviors(
            **vars(retrieval),
            target_CD=value_ND[:0],
            value_SD=at_least_one_row(value_ND),
            place=retrieval.windows.index,
        )
        user_WGD = self._sequence.users(behaviors) * self.scale
        one = torch.ones(*user_WGD.shape[:2], 1)
        return UserVectors(torch.cat([user_WGD, one], dim=2), self._offset(batch))

    def _offset(self, batch: RequestBatch) -> Tensor:
        """What the context adds to every logit of a request, float32 [R]."""
        context = self.model.config.roles.context
        if not context or batch.context is None:
            return torch.zeros(batch.requests)
        vector_RD = self.model.lookups({context: self.model.collections[context](batch.context)})[context]
        offset: Tensor = vector_RD @ self._head.item.weight[self._place, self._sequence.width :]
        return offset


def _towers(snapshot: Snapshot) -> list[str]:
    """The tasks with a tower, in the order of the head's outputs."""
    return [task.name for task in snapshot.model.tasks if task.has_tower]
