"""What a space of vectors is: vectors of items, and what finds them by inner product."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.model.branch import Branch
from trainer.snapshot.loading import Snapshot


class UserVectors(NamedTuple):
    """What a space knows of the users of R requests.

    Attributes:
        vector: float32 [R, G, width], one for each group of items; G is 1 in a space without groups.
        offset: float32 [R], what the model's score of an item is above the inner product.
    """

    vector: Tensor
    offset: Tensor


class Space(ABC):
    """Vectors of items, and the queries that find them by the largest inner product.

    All of them come from the modules of the snapshot's model. What an inner product is multiplied by in the
    model is in the queries already.

    Args:
        snapshot: whose vectors; branch: of a model with several; task: whose score it is, where it matters.

    Attributes:
        name: on the command line; about: one sentence for the manifest, which says what the product is.
        user_obstacle: why a user has no vector in it; empty if they have one.
        reads_task: whether the task matters.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    user_obstacle: ClassVar[str] = ""
    reads_task: ClassVar[bool] = False

    def __init__(self, snapshot: Snapshot, branch: str, task: str) -> None:
        self.snapshot, self.model, self.branch_name, self.task = snapshot, snapshot.model, branch, task

    @classmethod
    @abstractmethod
    def problem(cls, snapshot: Snapshot, branch: str, task: str) -> str:
        """Why this model has no such space; empty if it has."""

    @property
    def heads(self) -> int:
        """Equal slices of a vector that have an inner product each."""
        return 1

    @property
    def scale(self) -> float:
        """What inner products are multiplied by in the model; queries and users hold it already."""
        return 1.0

    @property
    def group_feature(self) -> str:
        """The feature of items whose id says which of a user's vectors is for them; empty: there is one."""
        return ""

    @property
    def branch(self) -> Branch:
        branch = self.model.branches[self.branch_name]
        assert isinstance(branch, Branch)
        return branch

    @abstractmethod
    def items(self, batch: RequestBatch) -> Tensor:
        """Vectors of the items of an `item_batch`, float32 [items, width]."""

    def queries(self, batch: RequestBatch) -> Tensor:
        """What looks for items, where an item does: float32 [items, width]."""
        raise NotImplementedError

    def users(self, batch: RequestBatch) -> UserVectors:
        """Vectors of the users of a batch of requests, with rows of tables in the place of ids."""
        raise NotImplementedError
