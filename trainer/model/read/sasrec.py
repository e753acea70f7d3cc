"""Target-decoupled SASRec for pre-ranking: several user vectors, made without seeing any candidate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.read.multi_head import heads_problem
from trainer.model.read.sequence import Behaviors, SequenceModel
from trainer.model.sizes import BranchSizes
from trainer.model.windows import Selection


class TargetDecoupledSasrec(SequenceModel):
    """One user matrix [G, D] a request; a candidate of group g is scored by its row g.

    Behaviors plus positions pass causal self-attention blocks that all groups share (SASRec); then each
    group's own query attends to the hidden states, with its own bias for every position, and its own linear
    map makes the row. A server caches the matrix per user and the candidates' vectors per item. Only the name
    and its place in pre-ranking are published; the equations are ours.

    Args:
        width: D; positions: newest behaviors it sees; groups: G; layers, heads: of the shared blocks.
    """

    uses = frozenset({"layers", "heads", "time_group"})
    on_windows = True
    two_towers = True

    @classmethod
    def problem(cls, settings: Any) -> str:
        needs = 'sequence = "sasrec" needs time_group, the feature that groups candidates'
        return "" if settings.time_group else needs

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> TargetDecoupledSasrec:
        width = sizes.representation.width
        return cls(width, sizes.longest, sizes.target_groups(), settings.layers, settings.heads)

    @classmethod
    def width_problem(cls, settings: Any, width: int) -> str:
        return heads_problem(settings.heads, width)

    def __init__(self, width: int, positions: int, groups: int, layers: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.position = nn.Parameter(torch.randn(positions + 1, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
            )
            for _ in range(layers)
        )
        self.query = nn.Parameter(torch.randn(groups, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(groups, positions + 1))
        self.out = nn.Parameter(torch.eye(width).repeat(groups, 1, 1))

    @property
    def output_width(self) -> int:
        return 2 * self.width

    def hidden(self, value_WXD: Tensor, selection: Selection) -> Tensor:
        """States [W, X, D] of windows whose column 0 is the newest; each sees itself and what is older."""
        state = value_WXD + F.embedding(selection.marks.position, self.position)
        length = state.shape[1]
        place = torch.arange(length, device=state.device)
        unseen = (place[None, :] < place[:, None])[None] | ~selection.mask[:, None, :]
        # A padding place sees itself: a row of nothing would be no number.
        unseen = unseen & ~torch.eye(length, dtype=torch.bool, device=state.device)
        mask = unseen.repeat_interleave(self.heads, dim=0)
        for block in self.blocks:
            state = block(state, src_mask=mask)
        return state

    def user_matrix(self, value_WXD: Tensor, selection: Selection) -> Tensor:
        """-> [W, G, D]; zero for a request without behaviors."""
        state_WXD = self.hidden(value_WXD, selection)
        bias_WXG = F.embedding(selection.marks.position, self.bias.T)
        score_WGX = (state_WXD @ self.query.T * self.width**-0.5 + bias_WXG).transpose(1, 2)
        weight_WGX = (
            score_WGX.masked_fill(~selection.mask[:, None], -1e30).softmax(2) * selection.mask[:, None]
        )
        return torch.einsum("wgd,gde->wge", weight_WGX @ state_WXD, self.out)

    def users(self, behaviors: Behaviors) -> Tensor:
        """-> the matrix of each window's user, [W, G, D]; it knows no candidate."""
        value_WXD = F.embedding(behaviors.place, behaviors.value_SD)
        return self.user_matrix(value_WXD, behaviors.selection)

    def forward(self, behaviors: Behaviors, weight_CHK: Tensor | None) -> list[Tensor]:
        """-> the user's vector for each candidate's group, and the candidate's."""
        users_WGD = self.users(behaviors)
        groups = self.query.shape[0]
        row_C = behaviors.windows.of_candidate * groups + behaviors.group_C
        return [F.embedding(row_C, users_WGD.flatten(0, 1)), behaviors.target_CD]
