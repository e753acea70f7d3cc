"""A second loss on the whole window, beside the main one on the kept behaviors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from embeddings.groups import TableGroup
from trainer.config.model import ModelConfig
from trainer.model.branch import Branch, Searched
from trainer.model.heads.mlp import Head
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.search import SoftSearch
from trainer.model.windows import pooled_windows


class WholeWindow(nn.Module):
    """Logits of a small head on the main branch's whole window.

    `softmax`: the branch's own scores and sequence model over all L behaviors (DARE's code). `index`: the raw
    inner products r of SIM's soft search, whose parameters only this loss trains: [v_t ; sum_i r_i e_i].
    """

    def __init__(self, config: ModelConfig, groups: Mapping[str, TableGroup], tasks: int) -> None:
        super().__init__()
        self.by_index = config.auxiliary == "index"
        width = groups[config.roles.representation_target].width
        parts = 2 if self.by_index or not config.target_aware else 3
        self.head = Head(parts * width, config.auxiliary_hidden, tasks, config.norm)

    def forward(self, branch: Branch, searched: Searched, target_CD: Tensor, value_ND: Tensor) -> Tensor:
        """-> logits [C, T]."""
        windows = searched.windows
        kept = windows.of_candidates()
        if self.by_index:
            search = branch.search
            assert isinstance(search, SoftSearch)
            score_CX = search.index.over_windows(search.index.encode(searched.raw), windows)[:, 0]
            weight_CX = torch.where(kept.mask, score_CX, 0.0)
            parts = [target_CD, pooled_windows(value_ND, windows.index, windows, weight_CX)]
        else:
            assert branch.scorer is not None
            score_CHX = branch.scorer.over_windows(searched.vectors, windows)
            weight_CHX = branch.weights(score_CHX, kept.mask[:, None])
            behaviors = Behaviors(target_CD, value_ND, windows.index, kept, windows, searched.raw, whole=True)
            parts = branch.sequence(behaviors, weight_CHX)
        logits: Tensor = self.head(parts)
        return logits
