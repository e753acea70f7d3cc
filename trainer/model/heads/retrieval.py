"""An auxiliary head with a user's and an item's tower, which trains the vectors that the search compares.

It is used in training alone, like every auxiliary head: what it trains are the attention tables. Its loss is
`trainer.objectives.retrieval`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from trainer.config.model import ModelKeys, Width
from trainer.config.tasks import TaskName
from trainer.config.toml import Settings
from trainer.data.batch import RequestBatch
from trainer.model.heads.auxiliary import Auxiliary, AuxiliarySizes
from trainer.model.heads.head import Perceptron
from trainer.model.ops.bags import rows_at
from trainer.model.ops.precision import full, in_single_precision
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.search import Retrieval as SearchResult
from trainer.model.windows import first_ids


class RetrievalConfig(Settings):
    """The auxiliary loss `retrieval`: a user's vector, made of the attention vectors of the whole window,
    shall be nearer to a positive candidate's vector than to those of the step's other candidates."""

    task: TaskName | Annotated[str, Field(pattern="^$")] = ""
    """The task whose positives are retrieved. Empty means the first one."""
    item: str = "item_id"
    """The feature of candidates that says which are the same item. They are no negatives of each other."""
    taxonomy: tuple[str, ...] = ()
    """Features of candidates with one id each that are a tree, coarsest first. They decide how far two items
    are from each other: 1 where they share no level, less with each that they share. Empty means that any
    two are as far."""
    dim: Width = 32
    """The width of both vectors, which have the length 1."""
    scale: float = Field(20.0, gt=0, allow_inf_nan=False)
    """What inner products are multiplied by: one by a temperature."""
    margin: float = Field(0.3, ge=0, allow_inf_nan=False)
    """By how much the inner product of a negative at distance 1 must be smaller (margin metric softmax). 0
    is a plain softmax."""


class RetrievalKeys(ModelKeys):
    """What a model may set besides, for the auxiliary loss `retrieval`."""

    retrieval: RetrievalConfig = RetrievalConfig()
    """The auxiliary loss `retrieval`, see [model.retrieval]."""


class Retrieved(NamedTuple):
    """What the head makes of C candidates.

    Attributes:
        user, item: float32 [C, D], of length 1; the candidates of a request have the same user.
        path: int64 [C, 1 + M], the item, then its ids in the taxonomy, coarsest first.
    """

    user: Tensor
    item: Tensor
    path: Tensor


class RetrievalHead(Auxiliary):
    """Two towers over attention vectors: the mean of those of the window, and the candidate's.

    Args:
        sizes: of the model around it; model: its settings.
    """

    keys: ClassVar[type[ModelKeys]] = RetrievalKeys
    reads_representation = False
    retrieves = True

    @classmethod
    def build(cls, model: Any, sizes: AuxiliarySizes) -> RetrievalHead:
        return cls(sizes, model)

    @classmethod
    def problem(cls, model: Any) -> str:
        owner = model.attention_owner
        if model.attend == ():
            return 'auxiliary = "retrieval" needs attention vectors, and attend = [] leaves none'
        if owner and owner != model.retrieval.task:
            why = "trains attention, which is owned by one task"
            return f'auxiliary = "retrieval" {why}: set retrieval.task = "{owner}" too'
        return ""

    @classmethod
    def features(cls, model: Any) -> dict[str, str]:
        places = enumerate(model.retrieval.taxonomy)
        return {
            "retrieval.item": model.retrieval.item,
            **{f"retrieval.taxonomy[{place}]": feature for place, feature in places},
        }

    def __init__(self, sizes: AuxiliarySizes, model: Any) -> None:
        super().__init__()
        config: RetrievalConfig = model.retrieval
        self.owner, self._features = config.task or sizes.tasks[0], (config.item, *config.taxonomy)
        self.scale = config.scale
        self.user, self.item = (
            Perceptron(sizes.attention, model.auxiliary_hidden, config.dim, model.norm) for _ in range(2)
        )

    def forward(self, batch: RequestBatch, branch: Any, behaviors: Behaviors, live: Any) -> Retrieved:
        """`live` decides nothing: whoever owns the attention is whose positives are retrieved."""
        path = torch.stack([first_ids(batch, feature)[1] for feature in self._features], dim=1)
        users = rows_at(self.users(behaviors), behaviors.windows.of_candidate)
        return Retrieved(users, self.items(behaviors.raw.query_CD), path)

    def users(self, searched: SearchResult) -> Tensor:
        """-> the vector of each window's user, [W, D]; it knows no candidate."""
        windows, key_ND = searched.windows, searched.raw.key_ND
        with in_single_precision(key_ND.device):
            mask_WX = windows.mask.float()
            share_WX = mask_WX / mask_WX.sum(1, keepdim=True).clamp(min=1)
            mean_WD = (share_WX[:, None] @ rows_at(full(key_ND), windows.index))[:, 0]
        return F.normalize(full(self.user([mean_WD])), dim=1)

    def items(self, query_CD: Tensor) -> Tensor:
        """Attention vectors of candidates -> their vectors, [C, D]."""
        return F.normalize(full(self.item([query_CD])), dim=1)
