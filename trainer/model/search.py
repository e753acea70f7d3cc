"""Stage one (GSU): which K behaviors of its request's window a candidate keeps.

A search is a function (query_CD, key_ND, bias, windows, k) -> Kept. It runs without gradient; the kept
scores are computed again with gradient in stage two, from the same vectors and the same bias, so both
stages share one score function and one set of parameters (TWIN, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.model.time import age_bucket


@dataclass
class Kept:
    """What stage one keeps.

    Attributes:
        index: int64 [C, K], behaviors of the batch; 0 where `mask` is False.
        mask: bool [C, K], False where a window holds fewer than K behaviors.
    """

    index: Tensor
    mask: Tensor


Bias = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Windows:
    """Where the requests' windows lie, padded to the longest: request r sees index[r, l] where mask[r, l].

    Attributes:
        index: int64 [R, L']; mask: bool [R, L']; rank: int64 [R, L'], 1 for the newest behavior;
        bucket: int64 [R, L'], log-bucketed age.
    """

    index: Tensor
    mask: Tensor
    rank: Tensor
    bucket: Tensor


def windows_of(batch: RequestBatch) -> Windows:
    """Lay the requests' windows side by side, newest behavior first (L' = longest window of the batch)."""
    length = batch.window_end - batch.window_start
    longest = int(length.max()) if length.numel() else 0
    step = torch.arange(longest, device=length.device)
    mask = step[None, :] < length[:, None]
    index = torch.where(mask, batch.window_end[:, None] - 1 - step[None, :], 0)
    rank = torch.where(mask, 1 + step[None, :], 0)
    age = batch.request_time[:, None] - batch.behavior_time[index] if longest else index
    return Windows(index, mask, rank, torch.where(mask, age_bucket(age), 0))


@torch.no_grad()
def dot_search(
    query_CD: Tensor, key_ND: Tensor, bias: Bias, windows: Windows, candidate_request: Tensor, k: int
) -> Kept:
    """Exact top-K by scaled dot product plus time bias, one batched product for all requests.

    Candidates are grouped by request, so a request's window is multiplied once with all its candidates:
    the cost follows C x L, whatever stretch of history a block holds.

    Args:
        query_CD: attention vectors of the candidates.
        key_ND: attention vectors of all behaviors of the batch.
        bias: (rank, bucket) -> additive score, see `TimeBias`.
        windows: of `windows_of`.
        candidate_request: int64 [C], ascending.
        k: K.
    """
    requests, longest = windows.index.shape
    candidates = query_CD.shape[0]
    if candidates == 0 or longest == 0:
        empty = torch.zeros(candidates, k, dtype=torch.int64, device=query_CD.device)
        return Kept(empty, torch.zeros_like(empty, dtype=torch.bool))
    counts = torch.bincount(candidate_request, minlength=requests)
    first = torch.cumsum(counts, 0) - counts
    slot = torch.arange(candidates, device=query_CD.device) - first[candidate_request]
    query_RSD = query_CD.new_zeros(requests, int(counts.max()), query_CD.shape[1])
    query_RSD[candidate_request, slot] = query_CD * query_CD.shape[1] ** -0.5
    score_RSL = torch.baddbmm(
        bias(windows.rank, windows.bucket).masked_fill(~windows.mask, -torch.inf)[:, None, :],
        query_RSD,
        key_ND[windows.index].transpose(1, 2),
    )
    score_CL = score_RSL[candidate_request, slot]
    top = score_CL.topk(min(k, longest), dim=1)
    column = torch.nn.functional.pad(top.indices, (0, k - top.indices.shape[1]))
    mask = torch.nn.functional.pad(top.values > -torch.inf, (0, k - top.values.shape[1]))
    index = windows.index[candidate_request[:, None], column]
    return Kept(torch.where(mask, index, 0), mask)


def dot_search_reference(
    query_CD: Tensor, key_ND: Tensor, bias: Bias, windows: Windows, candidate_request: Tensor, k: int
) -> Kept:
    """`dot_search` one candidate at a time: the slow reference of the property test."""
    index = torch.zeros(query_CD.shape[0], k, dtype=torch.int64)
    mask = torch.zeros(query_CD.shape[0], k, dtype=torch.bool)
    time_RL = bias(windows.rank, windows.bucket)
    for c, request in enumerate(candidate_request.tolist()):
        behaviors = windows.index[request][windows.mask[request]]
        score = (
            key_ND[behaviors] @ query_CD[c] * query_CD.shape[1] ** -0.5
            + time_RL[request][windows.mask[request]]
        )
        best = score.argsort(descending=True, stable=True)[:k]
        index[c, : best.numel()] = behaviors[best]
        mask[c, : best.numel()] = True
    return Kept(index, mask)
