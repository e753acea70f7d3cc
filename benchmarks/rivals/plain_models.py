"""What `tandemrec bench step` compares with: the same models as research code writes them.

`PlainDare` has `nn.Embedding` tables with dense gradients, and every sample carries its own padded history
(shapes as in `trainer.data.batch`). `PlainMlpScorer` is DIN's attention as its paper draws it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.heads.head import Perceptron
from trainer.model.ops.bags import rows_at
from trainer.model.retrieve.score import AttentionVectors, MlpScorer
from trainer.model.windows import Windows

_HIDDEN, _AUXILIARY_HIDDEN = (200, 80), (200,)


class PlainDare(nn.Module):
    """DARE (sections 3.1 to 3.3) with positions, as `configs/dare.toml` without age: a test compares logits.

    Args:
        rows: of the tables of item and category; dim: of each; length: L; k: K.
        published: as the authors' code does it: representations of all L behaviors, weighted by a softmax
            that a mask keeps to K of them, and a second head on all of them for the auxiliary loss. Else only
            the K kept behaviors are looked up, which gives the same main logits.
    """

    def __init__(
        self, rows: Mapping[str, int], dim: int, length: int, k: int, *, published: bool = False
    ) -> None:
        super().__init__()
        width = dim * len(rows)
        self.attention = nn.ModuleList(_table(count, dim) for count in rows.values())
        self.representation = nn.ModuleList(_table(count, dim) for count in rows.values())
        self.bias = nn.Parameter(torch.zeros(length + 1))
        self.position = nn.Parameter(torch.zeros(length + 1, width))
        self.head = Perceptron(3 * width, _HIDDEN, 1)
        self.k, self.published = k, published
        self.auxiliary = Perceptron(3 * width, _AUXILIARY_HIDDEN, 1) if published else None

    def forward(self, history: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """History [2, C, L], newest first, 0 = padding; target [2, C] -> logits [C, 1], auxiliary or None."""
        mask_CL = history[0] > 0
        query_CD, key_CLD = _vectors(self.attention, target), _vectors(self.attention, history)
        score_CL = (key_CLD @ query_CD.unsqueeze(2)).squeeze(2) * query_CD.shape[1] ** -0.5
        score_CL = (score_CL + self.bias[1 : 1 + mask_CL.shape[1]]).masked_fill(~mask_CL, -1e30)
        best = score_CL.topk(self.k, dim=1)
        target_CD = _vectors(self.representation, target) + self.position[0]
        if not self.published:
            kept = history.gather(2, best.indices.expand(history.shape[0], -1, -1))
            value_CKD = _vectors(self.representation, kept) + self.position[1 + best.indices]
            return self._logits(self.head, target_CD, best.values, value_CKD), None
        value_CLD = _vectors(self.representation, history) + self.position[1 : 1 + mask_CL.shape[1]]
        kept_CL = torch.zeros_like(mask_CL).scatter(1, best.indices, True)
        main = self._logits(self.head, target_CD, score_CL.masked_fill(~kept_CL, -1e30), value_CLD)
        assert self.auxiliary is not None
        return main, self._logits(self.auxiliary, target_CD, score_CL, value_CLD)

    @staticmethod
    def _logits(head: Perceptron, target_CD: Tensor, score_CX: Tensor, value_CXD: Tensor) -> Tensor:
        pooled_CD = (score_CX.softmax(1).unsqueeze(1) @ value_CXD).squeeze(1)
        logits: Tensor = head([target_CD, pooled_CD, target_CD * pooled_CD])
        return logits


def _table(rows: int, dim: int) -> nn.Embedding:
    # From a tensor: nn.Embedding's own normal draws take seconds for millions of rows.
    first = torch.empty(rows, dim).uniform_(-0.05, 0.05)
    table: nn.Embedding = nn.Embedding.from_pretrained(first, freeze=False)
    return table


def _vectors(tables: nn.ModuleList, ids: Tensor) -> Tensor:
    """[features, ...] -> [..., all widths]."""
    return torch.cat([table(part) for table, part in zip(tables, ids, strict=True)], dim=-1)


class PlainMlpScorer(MlpScorer):
    """The same weights, applied to [q; k; q - k; q * k] built for every pair, 4D wide (DIN, figure 2)."""

    def __init__(self, scorer: MlpScorer) -> None:
        super().__init__(scorer.width, scorer.first.out_features, scorer.bias)
        self.first, self.slope, self.last = scorer.first, scorer.slope, scorer.last

    def over_windows(self, vectors: AttentionVectors, windows: Windows) -> Tensor:
        score = self._score(vectors, rows_at(vectors.key_ND, windows.index[windows.of_candidate]))
        score = score + self._window_bias(vectors, windows).index_select(0, windows.of_candidate)
        bias = self._target_bias(vectors, windows)
        return (score if bias is None else score + bias)[:, None]

    def _score(self, vectors: AttentionVectors, key_CXD: Tensor) -> Tensor:
        query_CXD = vectors.query_CD.unsqueeze(1).expand_as(key_CXD)
        pairs = torch.cat([query_CXD, key_CXD, query_CXD - key_CXD, query_CXD * key_CXD], dim=2)
        score: Tensor = self.last(self.slope(self.first(pairs))).squeeze(2) / self.width
        return score


def plain_loss(logits: tuple[Tensor, Tensor | None], labels_CT: Tensor) -> Tensor:
    """Mean binary cross entropy, of the auxiliary head too where there is one."""
    main, auxiliary = logits
    loss = F.binary_cross_entropy_with_logits(main, labels_CT)
    return loss if auxiliary is None else loss + F.binary_cross_entropy_with_logits(auxiliary, labels_CT)
