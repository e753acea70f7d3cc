"""Stage one as one pass over the keys where they lie, in Triton: products, bias and the K best columns.

A program takes up to four candidates of one window and one span of its columns. It reads each key of the
span once, multiplies it with all its candidates, and holds the scores in registers, [tiles, columns of a
tile] a candidate. What the K best are is found by counting, not by sorting: the bound that exactly K scores
reach lies between the lowest and the highest, and is halved in on. So the cost does not depend on K, columns
are written in their order by a running count, and of equal scores the lower columns are kept.

Every score is one sum over D in one order, whatever the window, the batch and the column: equal behaviors
have equal scores. All offsets into keys, bias and index are 64 bits wide.

Imported only where a kernel runs: Triton comes with the CUDA build of torch alone.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.ops.kernels import power_of_two
from trainer.model.retrieve.window_search import Cut
from trainer.model.windows import Windows

# Tiles of keys in flight.
_STAGES = 3
# Steps between two scores by value; after these by bits, of which there are 32.
_HALVINGS = tl.constexpr(10)
_UNBOUND = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _order(value):
    """float32 -> int32 in the same order; the function is its own inverse but for the type."""
    bits = tl.cast(value, tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(order):
    return tl.cast(order ^ ((order >> 31) & 0x7FFFFFFF), tl.float32, bitcast=True)


@triton.jit
def _bound(score, k):
    """-> the highest bound that at least K scores reach, and how many do; all that are not -inf, if fewer.

    The bound is searched for between the lowest and the highest score, first by value, then by bits, until
    exactly K reach it, or until nothing lies between: more than K reach it then, being equal.
    """
    real = score > float("-inf")
    reach = tl.sum(real.to(tl.int32))
    low = _order(tl.min(tl.where(real, score, float("inf"))))
    high = _order(tl.max(score))
    step = 0
    while (reach > k) & (low < high):
        middle = _order(0.5 * _value(low) + 0.5 * _value(high))
        if (step >= _HALVINGS) | (middle <= low) | (middle > high):
            middle = (low | high) - ((low ^ high) >> 1)
        found = tl.sum((score >= _value(middle)).to(tl.int32))
        if found >= k:
            low = middle
            reach = found
        else:
            high = middle - 1
        step += 1
        if step >= _HALVINGS:
            # Few scores are left between, so both ends move to the nearest of them.
            low = _order(tl.min(tl.where(score >= _value(low), score, float("inf"))))
            high = _order(tl.max(tl.where(score <= _value(high), score, float("-inf"))))
    return _value(low), reach


@triton.jit
def _kept(score, x, k):
    """-> which of the scores [T, X] are the K best, the place of each in the order of columns, how many."""
    bound, reach = _bound(score, k)
    above = score > bound
    level = (score == bound) & (score > float("-inf"))
    last = _UNBOUND
    if reach > k:
        # More are level with the bound than there is room for: the first of them, up to this column.
        need = k - tl.sum(above.to(tl.int32))
        first = tl.min(x)
        last = tl.max(x)
        while first < last:
            middle = (first + last) // 2
            if tl.sum((level & (x <= middle)).to(tl.int32)) >= need:
                last = middle
            else:
                first = middle + 1
    keep = above | (level & (x <= last))
    run = tl.cumsum(tl.reshape(keep.to(tl.int32), [keep.shape[0] * keep.shape[1]]), 0)
    return keep, tl.reshape(run, [keep.shape[0], keep.shape[1]]) - 1, tl.minimum(reach, k)


@triton.jit
def _write(score, x, column, row, k, width, kept_column, kept_mask, SLOTS: tl.constexpr):
    """The K best of a candidate; `column` of each score, `x` its rank among equal ones."""
    keep, place, many = _kept(score, x, k)
    slot = tl.arange(0, SLOTS)
    tl.store(kept_column + row * k + place, column.to(tl.int64), mask=keep)
    last = tl.full([SLOTS], 0, tl.int64) + (width - 1)
    tl.store(kept_column + row * k + slot, last, mask=(slot >= many) & (slot < k))
    tl.store(kept_mask + row * k + slot, (slot < many).to(tl.uint8), mask=slot < k)


@triton.jit
def _write_some(score, x, row, k, some_score, some_column, SLOTS: tl.constexpr):
    """The K best of one span, with their scores; -inf where there are fewer."""
    keep, place, many = _kept(score, x, k)
    slot = tl.arange(0, SLOTS)
    tl.store(some_score + row * k + place, score, mask=keep)
    tl.store(some_column + row * k + place, x, mask=keep)
    none = tl.full([SLOTS], float("-inf"), tl.float32)
    tl.store(some_score + row * k + slot, none, mask=(slot >= many) & (slot < k))


# fmt: off
@triton.jit
def _scores(
    query, key, index, mask, bias, begin, end, start, length,
    D: tl.constexpr, WIDE: tl.constexpr, TOGETHER: tl.constexpr, T: tl.constexpr, BX: tl.constexpr,
    STRETCH: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr, STAGES: tl.constexpr,
):
    """-> a tuple of the scores [T, BX] of the candidates from `begin`; -inf where nothing counts.

    index, mask, bias: of the window. A tile of keys is copied while those before it are multiplied.
    """
    d = tl.arange(0, WIDE)
    queries = ()
    scores = ()
    for c in tl.static_range(TOGETHER):
        inside = (d < D) & (begin + c < end)
        queries = queries + (tl.load(query + (begin + c) * D + d, mask=inside, other=0.0),)  # type: ignore[assignment]
        scores = scores + (tl.full([T, BX], float("-inf"), tl.float32),)  # type: ignore[assignment]
    step = tl.arange(0, T)[:, None]
    newest = tl.load(index)
    for t in tl.range(0, tl.cdiv(tl.minimum(length - start, T * BX), BX), num_stages=STAGES):
        x = start + t * BX + tl.arange(0, BX)
        seen = x < length
        row = newest - x
        if not STRETCH:
            row = tl.load(index + x, mask=seen, other=0)
        whole = seen[:, None] if D == WIDE else seen[:, None] & (d < D)[None, :]
        key_XD = tl.load(key + row[:, None] * D + d[None, :], mask=whole, other=0.0)
        if BIASED:
            added = tl.load(bias + x, mask=seen, other=float("-inf"))
        if MASKED:
            counts = tl.load(mask + x, mask=seen, other=0) != 0
        longer = ()
        for c in tl.static_range(TOGETHER):
            score = tl.sum(key_XD * queries[c][None, :], 1)
            # What is masked is never kept, not even where its score is NaN.
            if BIASED:
                score = tl.where(added == float("-inf"), float("-inf"), score + added)
            if MASKED:
                score = tl.where(counts, score, float("-inf"))
            longer = longer + (tl.where(step == t, score[None, :], scores[c]),)  # type: ignore[assignment]
        scores = longer
    return scores


@triton.jit(do_not_specialize=["k", "width", "tiles", "spans"])
def search_kernel(
    query, key, index, lengths, mask, bias, first,
    kept_column, kept_mask, some_score, some_column, k, width, tiles, spans,
    D: tl.constexpr, WIDE: tl.constexpr, TOGETHER: tl.constexpr, T: tl.constexpr, BX: tl.constexpr,
    SLOTS: tl.constexpr, STRETCH: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr,
):
    """One program a span of a window and a tile of its candidates, tiles next to each other.

    first: int64 [W + 1], the first candidate of each window. WIDE: D up to a power of two. STRETCH: rows
    follow from index[w, 0] and lengths [W], else from index [W, X]. WHOLE: a span is a window, and what is
    kept is final, else `some_score` and `some_column` [C, spans, K] take it.
    """
    program = tl.program_id(0)
    rest = program // tiles
    span = rest % spans
    window = (rest // spans).to(tl.int64)
    begin = tl.load(first + window) + (program % tiles) * TOGETHER
    end = tl.load(first + window + 1)
    if begin >= end:
        return
    start = span * (T * BX)
    length = width
    if STRETCH:
        length = tl.load(lengths + window).to(tl.int32)
    column = window * width
    scores = _scores(
        query, key, index + column, mask + column, bias + column, begin, end, start, length,
        D, WIDE, TOGETHER, T, BX, STRETCH, MASKED, BIASED, STAGES,
    )  # fmt: skip
    x = start + tl.arange(0, T)[:, None] * BX + tl.arange(0, BX)[None, :]
    for c in tl.static_range(TOGETHER):
        if begin + c < end:
            # NaN is the best.
            score = tl.where(scores[c] != scores[c], float("inf"), scores[c])
            score = tl.where(x < length, score, float("-inf"))
            if WHOLE:
                _write(score, x, x, begin + c, k, width, kept_column, kept_mask, SLOTS)
            else:
                _write_some(score, x, (begin + c) * spans + span, k, some_score, some_column, SLOTS)


@triton.jit(do_not_specialize=["left", "k", "width"])
def merge_kernel(
    some_score, some_column, kept_column, kept_mask, left, k, width, LEFT: tl.constexpr, SLOTS: tl.constexpr,
):
    """One program a candidate: the K best of what its window's spans have left, [C, left]."""
    candidate = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, LEFT)[None, :]
    score = tl.load(some_score + candidate * left + x, mask=x < left, other=float("-inf"))
    column = tl.load(some_column + candidate * left + x, mask=score > float("-inf"), other=0)
    _write(score, x, column, candidate, k, width, kept_column, kept_mask, SLOTS)
# fmt: on


def constants(cut: Cut, dim: int, k: int, *, stretch: bool, biased: bool) -> dict[str, Any]:
    """What `search_kernel` is compiled for."""
    return {
        "D": dim,
        "WIDE": cut.wide,
        "TOGETHER": cut.together,
        "T": cut.steps,
        "BX": cut.columns,
        "SLOTS": power_of_two(k),
        "STRETCH": stretch,
        # A bias is -inf where the mask is False.
        "MASKED": not stretch and not biased,
        "BIASED": biased,
        "WHOLE": cut.spans == 1,
        "STAGES": _STAGES,
    }


def best_columns(
    query_CD: Tensor, key_ND: Tensor, windows: Windows, bias_WX: Tensor | None, k: int, cut: Cut
) -> tuple[Tensor, Tensor]:
    """See `trainer.model.retrieve.window_search.best_columns`; K is at most X, and there are candidates."""
    candidates, (count, width), device = query_CD.shape[0], windows.index.shape, query_CD.device
    column_CK = torch.empty(candidates, k, dtype=torch.int64, device=device)
    mask_CK = torch.empty(candidates, k, dtype=torch.bool, device=device)
    # A kernel must be given some pointer, also where it follows none.
    some = (candidates, cut.spans, k) if cut.spans > 1 else (1,)
    some_score = torch.empty(some, dtype=torch.float32, device=device)
    some_column = torch.empty(some, dtype=torch.int32, device=device)
    first = torch.searchsorted(windows.of_candidate, torch.arange(count + 1, device=device))
    stretch, biased = windows.lengths is not None, bias_WX is not None
    with torch.cuda.device_of(query_CD):
        search_kernel[(count * cut.tiles * cut.spans,)](
            query_CD.contiguous(), key_ND.contiguous(), windows.index.contiguous(),
            first if windows.lengths is None else windows.lengths.contiguous(),
            windows.mask.contiguous().view(torch.uint8), first if bias_WX is None else bias_WX.contiguous(),
            first, column_CK, mask_CK.view(torch.uint8), some_score, some_column,
            k, width, cut.tiles, cut.spans,
            **constants(cut, query_CD.shape[1], k, stretch=stretch, biased=biased), num_warps=cut.warps,
        )  # fmt: skip
        if cut.spans > 1:
            left = power_of_two(cut.spans * k)
            merge_kernel[(candidates,)](
                some_score, some_column, column_CK, mask_CK.view(torch.uint8), cut.spans * k, k, width,
                LEFT=left, SLOTS=power_of_two(k), num_warps=min(max(left // 256, 1), 8),
            )  # fmt: skip
    return column_CK, mask_CK
