"""What stage two of a model read of a batch, and the vectors that come of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.model.branch import Reading
from trainer.model.frame import Pooled, TwoStageModel

# Candidates that are pooled at a time, for the memory of it.
_AT_ONCE = 256


@torch.no_grad()
def pooled_of(model: TwoStageModel, batch: RequestBatch) -> Pooled:
    """What stage two gives for a batch with the ids that the model knows."""
    seen: list[Pooled] = []
    hook = model.pooling.register_forward_hook(lambda _, __, pooled: seen.append(pooled))
    try:
        model(batch)
    finally:
        hook.remove()
    (pooled,) = seen
    return pooled


def weights_of(reading: Reading) -> Tensor:
    """The weight of each kept behavior, [C, K], the mean over heads; the same for all without a scorer."""
    behaviors = reading.behaviors
    if reading.weight_CHK is not None:
        return reading.weight_CHK.float().mean(1)
    mask = behaviors.windows.of_candidates().mask if behaviors.whole else behaviors.selection.mask
    if len(mask) != len(behaviors.windows.of_candidate):
        # A sequence model that works on windows has one row for each window.
        mask = mask[behaviors.windows.of_candidate]
    return mask.float() / mask.sum(1, keepdim=True).clamp(min=1)


def weighted_sum(vectors_SD: Tensor, place_CK: Tensor, weight_CK: Tensor) -> npt.NDArray[Any]:
    """sum_k weight[c, k] * vectors[place[c, k]], float32 [C, D]."""
    chunks = zip(weight_CK.split(_AT_ONCE), place_CK.split(_AT_ONCE), strict=True)
    parts = [(weights[:, None] @ vectors_SD[places].float())[:, 0] for weights, places in chunks]
    whole = torch.cat(parts) if parts else vectors_SD.new_zeros(0, vectors_SD.shape[1])
    return np.asarray(whole.detach().cpu().numpy())


def places_of(reading: Reading) -> Tensor:
    """Rows of `value_SD` of what each candidate keeps, [C, K]."""
    behaviors = reading.behaviors
    place = behaviors.place_CK
    of_candidate = behaviors.windows.of_candidate
    return place if len(place) == len(of_candidate) else place[of_candidate]
