"""The space of the representation: what the rest of the model reads of an item."""

from __future__ import annotations

from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.snapshot.loading import Snapshot
from trainer.snapshot.retrieval.item_batch import looked_up
from trainer.snapshot.retrieval.spaces.space import Space


class RepresentationSpace(Space):
    """Items as behaviors, found by items as candidates. No score of the model is this product."""

    name = "representation"
    about = "the product of two representations, which is no score of the model"
    user_obstacle = (
        "what is read of a history is pooled by weights that depend on the candidate, so a user has no "
        "representation of their own"
    )

    @classmethod
    def problem(cls, snapshot: Snapshot, branch: str, task: str) -> str:
        return ""

    def items(self, batch: RequestBatch) -> Tensor:
        group = self.branch.settings.roles.representation_behavior
        return looked_up(self.snapshot, group, batch)[: batch.behaviors]

    def queries(self, batch: RequestBatch) -> Tensor:
        roles = self.branch.settings.roles
        groups = self.snapshot.model.lookups.groups
        target, behavior = groups[roles.representation_target], groups[roles.representation_behavior]
        if target.width != behavior.width:
            return self.items(batch)
        return looked_up(self.snapshot, target.name, batch)[batch.behaviors :]
