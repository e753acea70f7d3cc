"""What `tandemrec bench serve` compares the scorer with: the same weights, written the way others serve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainer.model.frame import TwoStageModel
from trainer.model.heads.head import MlpHead

Program = Callable[[Tensor, Tensor], Tensor]


class PlainProgram(nn.Module):
    """A two-stage model with softmax attention and without time, as a function of ids for torch.export.

    history [L] newest first, candidates [C] -> probabilities [C].
    """

    attention: Tensor
    representation: Tensor
    layers: nn.Module

    def __init__(self, attention: Tensor, representation: Tensor, model: TwoStageModel, k: int) -> None:
        super().__init__()
        self.register_buffer("attention", attention, persistent=False)
        self.register_buffer("representation", representation, persistent=False)
        assert isinstance(model.head, MlpHead)
        self.layers, self.k = model.head.layers, k

    def forward(self, history_L: Tensor, candidate_C: Tensor) -> Tensor:
        query_CD = self.attention[candidate_C] * self.attention.shape[1] ** -0.5
        score_CL = query_CD @ self.attention[history_L].T
        best = score_CL.topk(self.k, dim=1)
        value_CKD = self.representation[history_L[best.indices]]
        pooled_CD = (best.values.softmax(1).unsqueeze(1) @ value_CKD).squeeze(1)
        return _head(self.layers, self.representation[candidate_C], pooled_CD)


def exported(plain: PlainProgram, length: int, candidates: int) -> Program:
    """The same as one `torch.export` program of these shapes."""
    example = (torch.zeros(length, dtype=torch.int64), torch.zeros(candidates, dtype=torch.int64))
    module: Program = torch.export.export(plain, example).module()
    return module


def per_sample(plain: PlainProgram, chunk: int = 16) -> Program:
    """Every candidate carries a copy of the history, `chunk` candidates at a time: eager, as papers train."""

    def run(history_L: Tensor, candidate_C: Tensor) -> Tensor:
        parts = []
        for some_C in candidate_C.split(chunk):
            history_CL = history_L.expand(some_C.numel(), -1).contiguous()
            query_CD = plain.attention[some_C] * plain.attention.shape[1] ** -0.5
            key_CLD = plain.attention[history_CL]
            best = (key_CLD @ query_CD.unsqueeze(2)).squeeze(2).topk(plain.k, dim=1)
            value_CKD = plain.representation[history_CL.gather(1, best.indices)]
            pooled_CD = (best.values.softmax(1).unsqueeze(1) @ value_CKD).squeeze(1)
            parts.append(_head(plain.layers, plain.representation[some_C], pooled_CD))
        return torch.cat(parts)

    return run


def attending_to_all(plain: PlainProgram) -> Program:
    """No search: attention over the whole history by representation vectors."""

    def run(history_L: Tensor, candidate_C: Tensor) -> Tensor:
        target_CD, value_LD = plain.representation[candidate_C], plain.representation[history_L]
        weight_CL = (target_CD * target_CD.shape[1] ** -0.5 @ value_LD.T).softmax(1)
        return _head(plain.layers, target_CD, weight_CL @ value_LD)

    return run


def _head(layers: nn.Module, target_CD: Tensor, pooled_CD: Tensor) -> Tensor:
    logits: Tensor = layers(torch.cat([target_CD, pooled_CD, target_CD * pooled_CD], dim=1))
    return logits.sigmoid().squeeze(1)
