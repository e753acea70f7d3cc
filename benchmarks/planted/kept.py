"""The behaviors that a model's search keeps, for every kind of search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.data.batch import RequestBatch


@torch.no_grad()
def kept_behaviors(model: nn.Module, batch: RequestBatch) -> tuple[Tensor, Tensor]:
    """-> index [C, K'] into the batch's behaviors and mask [C, K'], of all branches and heads side by side.

    Args:
        model: a `TwoStageModel`, or what wraps it for training.
    """
    inner: Any = getattr(model, "module", model)
    searched = inner.searched(batch).items()
    # A model of whole windows searches nothing: each candidate keeps all of its window.
    kept = [
        each.windows.of_candidates() if inner.branches[name].sequence.on_windows else each.kept
        for name, each in searched
    ]
    count = batch.candidates
    index = torch.cat([each.index.reshape(count, -1) for each in kept], dim=1)
    return index, torch.cat([each.mask.reshape(count, -1) for each in kept], dim=1)
