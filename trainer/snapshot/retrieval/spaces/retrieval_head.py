"""The space of the auxiliary loss `retrieval`, which trains a tower of users and one of items."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.model.heads.retrieval import RetrievalHead
from trainer.snapshot.loading import Snapshot
from trainer.snapshot.retrieval.spaces.space import Space, UserVectors


class RetrievalSpace(Space):
    """Of `auxiliary = "retrieval"`: both vectors have the length 1, so their product is a cosine.

    An item is found by users, not by items: the two towers compare nothing else.
    """

    name = "retrieval"
    about = "what the loss `retrieval` compares: scale times the cosine of user and item"

    @classmethod
    def problem(cls, snapshot: Snapshot, branch: str, task: str) -> str:
        if not isinstance(snapshot.model.auxiliary, RetrievalHead):
            return 'the model was trained without auxiliary = "retrieval"'
        return "" if branch == "main" else 'the towers of auxiliary = "retrieval" are those of branch main'

    @property
    def scale(self) -> float:
        return self._towers.scale

    @property
    def _towers(self) -> RetrievalHead:
        assert isinstance(self.model.auxiliary, RetrievalHead)
        return self.model.auxiliary

    def items(self, batch: RequestBatch) -> Tensor:
        return self._towers.items(self.model.retrieve(batch)[self.branch_name].raw.query_CD)

    def users(self, batch: RequestBatch) -> UserVectors:
        user_RD = self._towers.users(self.model.retrieve(batch)[self.branch_name])
        return UserVectors((user_RD * self.scale)[:, None], torch.zeros(batch.requests))
