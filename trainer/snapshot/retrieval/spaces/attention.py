"""The spaces of attention: what stage one and two of a branch compare."""

from __future__ import annotations

from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.model.branch import Branch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.snapshot.loading import Snapshot
from trainer.snapshot.retrieval.spaces.space import Space


class AttentionSpace(Space):
    """Items as behaviors. A candidate that looks for them finds those that it would attend to."""

    name = "attention"
    about = (
        "of head h: the attention score of the item as a behavior for the candidate that asks, without what "
        "marks and cross features of the behavior add"
    )
    user_obstacle = (
        "what a candidate attends to depends on the candidate, so a user has no attention vector of their own"
    )

    @classmethod
    def problem(cls, snapshot: Snapshot, branch: str, task: str) -> str:
        found = snapshot.model.branches[branch]
        assert isinstance(found, Branch)
        if found.scorer is None:
            return f'sequence = "{found.settings.sequence}" weighs no behaviors for a candidate'
        if not isinstance(found.scorer, DotScorer):
            return f'score = "{found.settings.score}" is no inner product'
        return "it attends to no feature" if found.settings.attend == () else ""

    @property
    def heads(self) -> int:
        return self._scorer.heads

    @property
    def scale(self) -> float:
        width = self.branch.attention_width
        if self._scorer.query is not None and self.branch.settings.projection == "heads":
            width = self.branch.settings.heads * self.branch.settings.head_dim
        return self._scorer.scale(width)

    @property
    def _scorer(self) -> DotScorer:
        assert isinstance(self.branch.scorer, DotScorer)
        return self.branch.scorer

    def _encoded(self, batch: RequestBatch) -> AttentionVectors:
        return self.model.retrieve(batch)[self.branch_name].vectors

    def items(self, batch: RequestBatch) -> Tensor:
        return self._encoded(batch).key_ND[: batch.behaviors]

    def queries(self, batch: RequestBatch) -> Tensor:
        return self._encoded(batch).query_CD


class QuerySpace(AttentionSpace):
    """Items as candidates. A behavior that looks for them finds those that would attend to it."""

    name = "query"
    about = "of head h: the attention score of the behavior that asks for the item as a candidate"

    def items(self, batch: RequestBatch) -> Tensor:
        return super().queries(batch)

    def queries(self, batch: RequestBatch) -> Tensor:
        return super().items(batch)
