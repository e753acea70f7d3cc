"""Stage one (GSU): which K behaviors of its request's window a candidate keeps.

A search is a function (query_CD, key_ND, bias, windows, k) -> Kept. It runs without gradient; the kept
scores are computed again with gradient in stage two, from the same vectors and the same bias, so both
stages share one score function and one set of parameters (TWIN, section 4.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.data.batch import RequestBatch
from trainer.model.time import age_bucket


@dataclass
class Kept:
    """What stage one keeps. All are 0 where `mask` is False.

    Attributes:
        index: int64 [C, K], behaviors of the batch; rank, bucket: int64 [C, K], their time, see `Windows`.
        mask: bool [C, K], False where a window holds fewer than K behaviors.
    """

    index: Tensor
    mask: Tensor
    rank: Tensor
    bucket: Tensor


Bias = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Windows:
    """Which behaviors are searched, padded to the longest: window w holds index[w, l] where mask[w, l].

    A window belongs to a request, or to a single candidate after a hard search in the data path.

    Attributes:
        index: int64 [W, L']; mask: bool [W, L']; rank: int64 [W, L'], 1 for the newest behavior;
        bucket: int64 [W, L'], log-bucketed age.
        of_candidate: int64 [C], ascending: each candidate's window.
    """

    index: Tensor
    mask: Tensor
    rank: Tensor
    bucket: Tensor
    of_candidate: Tensor


def windows_of(batch: RequestBatch, history_length: int) -> Windows:
    """What the batch's candidates may keep: their request's window, or what a hard search retrieved."""
    if batch.retrieval is not None:
        return _retrieved_windows(batch, history_length)
    return _request_windows(batch)


def _retrieved_windows(batch: RequestBatch, history_length: int) -> Windows:
    """One window a candidate; ranks beyond L share the last place of the time tables."""
    found = batch.retrieval
    assert found is not None
    mask = found.index >= 0
    index = torch.where(mask, found.index, 0)
    age = (
        batch.request_time[batch.candidate_request][:, None] - batch.behavior_time[index]
        if batch.behaviors
        else index
    )
    bucket = torch.where(mask, age_bucket(age), 0)
    each = torch.arange(batch.candidates, device=index.device)
    return Windows(index, mask, found.rank.clamp(max=history_length), bucket, each)


def _request_windows(batch: RequestBatch) -> Windows:
    """The requests' windows side by side, newest behavior first (L' = longest window of the batch)."""
    length = batch.window_end - batch.window_start
    longest = int(length.max()) if length.numel() else 0
    step = torch.arange(longest, device=length.device)
    mask = step[None, :] < length[:, None]
    index = torch.where(mask, batch.window_end[:, None] - 1 - step[None, :], 0)
    rank = torch.where(mask, 1 + step[None, :], 0)
    age = batch.request_time[:, None] - batch.behavior_time[index] if longest else index
    bucket = torch.where(mask, age_bucket(age), 0)
    return Windows(index, mask, rank, bucket, batch.candidate_request)


@torch.no_grad()
def dot_search(query_CD: Tensor, key_ND: Tensor, bias: Bias, windows: Windows, k: int) -> Kept:
    """Exact top-K by scaled dot product plus time bias, one batched product for all windows.

    Candidates are grouped by window, so a request's window is multiplied once with all its candidates:
    the cost follows C x L, whatever stretch of history a block holds.

    Args:
        query_CD: attention vectors of the candidates.
        key_ND: attention vectors of all behaviors of the batch.
        bias: (rank, bucket) -> additive score, see `TimeBias`.
        windows: of `windows_of`.
        k: K.
    """
    window_C = windows.of_candidate
    if not query_CD.shape[0] or not windows.index.shape[1] or not key_ND.shape[0]:
        return _nothing(query_CD, k)
    counts = torch.bincount(window_C, minlength=windows.index.shape[0])
    first = torch.cumsum(counts, 0) - counts
    slot_C = torch.arange(query_CD.shape[0], device=query_CD.device) - first[window_C]
    query_WSD = query_CD.new_zeros(counts.numel(), int(counts.max()), query_CD.shape[1])
    query_WSD[window_C, slot_C] = query_CD * query_CD.shape[1] ** -0.5
    score_WSL = torch.baddbmm(
        bias(windows.rank, windows.bucket).masked_fill(~windows.mask, -torch.inf)[:, None, :],
        query_WSD,
        key_ND[windows.index].transpose(1, 2),
    )
    return _kept(windows, *top_columns(score_WSL[window_C, slot_C], k), k)


def top_columns(score_CL: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The K best columns of each row, ascending, and which of them count; ties go to the lower column.

    `topk` alone keeps any of several equal scores, which one depending on the width of the tensor, so that
    a request would be scored differently in other company. -inf is never kept.
    """
    width = score_CL.shape[1]
    best = score_CL.topk(min(k + 1, width), dim=1)
    column_CK, value_CK = best.indices[:, :k], best.values[:, :k]
    if width > k:
        tied = (best.values[:, k - 1] == best.values[:, k]) & (best.values[:, k] > -torch.inf)
        rows = torch.nonzero(tied).squeeze(1)
        if rows.numel():
            exact = score_CL[rows].sort(dim=1, descending=True, stable=True)
            column_CK = column_CK.index_copy(0, rows, exact.indices[:, :k])
            value_CK = value_CK.index_copy(0, rows, exact.values[:, :k])
    mask_CK = ~(value_CK == -torch.inf)
    order_CK = torch.where(mask_CK, column_CK, width).sort(dim=1)
    return order_CK.values.clamp(max=width - 1), order_CK.values < width


def _nothing(query_CD: Tensor, k: int) -> Kept:
    zero = torch.zeros(query_CD.shape[0], k, dtype=torch.int64, device=query_CD.device)
    return Kept(zero, zero.bool(), zero, zero)


def _kept(windows: Windows, column_CK: Tensor, mask_CK: Tensor, k: int) -> Kept:
    """Follow columns of the windows to behaviors and their times, padded to K."""
    missing = k - column_CK.shape[1]
    column = nn.functional.pad(column_CK, (0, missing))
    mask = nn.functional.pad(mask_CK, (0, missing))
    window = windows.of_candidate[:, None]
    index, rank, bucket = (
        torch.where(mask, part[window, column], 0) for part in (windows.index, windows.rank, windows.bucket)
    )
    return Kept(index, mask, rank, bucket)


def dot_search_reference(query_CD: Tensor, key_ND: Tensor, bias: Bias, windows: Windows, k: int) -> Kept:
    """`dot_search` one candidate at a time: the slow reference of the property test."""
    column = torch.zeros(query_CD.shape[0], k, dtype=torch.int64)
    mask = torch.zeros(query_CD.shape[0], k, dtype=torch.bool)
    time_WL = bias(windows.rank, windows.bucket)
    for c, window in enumerate(windows.of_candidate.tolist()):
        seen = torch.nonzero(windows.mask[window]).squeeze(1)
        key = key_ND[windows.index[window][seen]]
        score = key @ query_CD[c] * query_CD.shape[1] ** -0.5 + time_WL[window][seen]
        best = seen[score.argsort(descending=True, stable=True)[:k]].sort().values
        column[c, : best.numel()] = best
        mask[c, : best.numel()] = True
    return _kept(windows, column, mask, k)
