"""Sums and products over a few rows of a matrix each, without a [C, K, D] intermediate in either direction.

torch's own backward passes add row by row on CPU, or first build all C x K rows. The gradient of a sum over
rows, sorted by row, is a sum again: every row gathers from the candidates that used it. Where torch runs on
another device the plain forms are used, which are also what tests compare with.

Shapes: index_CK int64, K rows of rows_ND for each of C candidates; the order of additions is fixed, so that
the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


def weighted_bags(rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """sum_k weight[c, k] * rows[index[c, k]] -> [C, D]."""
    rows_ND, weight_CK = _full(rows_ND), _full(weight_CK)
    if not _fast(rows_ND, index_CK):
        return plain_weighted_bags(rows_ND, index_CK, weight_CK)
    found: Tensor = _WeightedBags.apply(rows_ND, index_CK, weight_CK)  # type: ignore[no-untyped-call]
    return found


def dots(query_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    """<query[c], rows[index[c, k]]> -> [C, K]."""
    query_CD, rows_ND = _full(query_CD), _full(rows_ND)
    if not _fast(rows_ND, index_CK):
        return plain_dots(query_CD, rows_ND, index_CK)
    found: Tensor = _Dots.apply(query_CD, rows_ND, index_CK)  # type: ignore[no-untyped-call]
    return found


def scalars(table_N: Tensor, index: Tensor) -> Tensor:
    """table[index], of the index's shape."""
    if not _fast(table_N, index):
        return plain_scalars(table_N, index)
    found: Tensor = _Scalars.apply(table_N, index)  # type: ignore[no-untyped-call]
    return found


def plain_weighted_bags(rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """`weighted_bags` by torch's own operator."""
    return F.embedding_bag(index_CK, rows_ND, per_sample_weights=weight_CK, mode="sum")


def plain_dots(query_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    """`dots` from all rows, [C, K, D]."""
    return (F.embedding(index_CK, rows_ND) @ query_CD.unsqueeze(2)).squeeze(2)


def plain_scalars(table_N: Tensor, index: Tensor) -> Tensor:
    """`scalars` by a lookup. Not table[index]: its backward adds in whatever order the threads come by."""
    return F.embedding(index, table_N[:, None]).squeeze(-1)


class _ByRow(NamedTuple):
    """Uses of rows, sorted by row: `order` of the flat index, `offsets` [N + 1] of each row's uses in it."""

    order: Tensor
    offsets: Tensor


def _by_row(index_CK: Tensor, rows: int) -> _ByRow:
    flat = index_CK.reshape(-1)
    uses = torch.bincount(flat, minlength=rows)
    # A radix sort: as many passes as the numbers have bytes.
    narrow = flat.to(torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32)
    return _ByRow(torch.sort(narrow, stable=True).indices, F.pad(uses.cumsum(0), (1, 0)))


def _gathered(part_CD: Tensor, weight_CK: Tensor, by_row: _ByRow) -> Tensor:
    """For each row, the sum of weight[c, k] * part[c] over its uses: [N, D]."""
    candidate = by_row.order.div(weight_CK.shape[1], rounding_mode="floor")
    weight = weight_CK.reshape(-1)[by_row.order]
    return F.embedding_bag(
        candidate, part_CD, by_row.offsets, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def _products(part_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    """<part[c], rows[index[c, k]]>, [C, K]: the operator that gives embedding_bag the gradient of weights."""
    candidates, k = index_CK.shape
    each = torch.arange(candidates, device=index_CK.device)
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        part_CD.contiguous(), rows_ND, index_CK.reshape(-1), each * k, each.repeat_interleave(k), 0
    )
    return found.view(candidates, k)


class _WeightedBags(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_ND, index_CK, weight_CK)
        return plain_weighted_bags(rows_ND, index_CK, weight_CK)

    @staticmethod
    def backward(ctx: Any, gradient_CD: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        rows_ND, index_CK, weight_CK = ctx.saved_tensors
        of_rows = of_weights = None
        if ctx.needs_input_grad[0]:
            of_rows = _gathered(gradient_CD, weight_CK, _by_row(index_CK, rows_ND.shape[0]))
        if ctx.needs_input_grad[2]:
            of_weights = _products(gradient_CD, rows_ND, index_CK)
        return of_rows, None, of_weights


class _Dots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
        ctx.save_for_backward(query_CD, rows_ND, index_CK)
        return _products(query_CD, rows_ND, index_CK)

    @staticmethod
    def backward(ctx: Any, gradient_CK: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query_CD, rows_ND, index_CK = ctx.saved_tensors
        of_query = of_rows = None
        if ctx.needs_input_grad[0]:
            of_query = plain_weighted_bags(rows_ND, index_CK, gradient_CK.contiguous())
        if ctx.needs_input_grad[1]:
            of_rows = _gathered(query_CD, gradient_CK, _by_row(index_CK, rows_ND.shape[0]))
        return of_query, of_rows, None


class _Scalars(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_N: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table_N.shape[0]
        return table_N.index_select(0, index.reshape(-1)).view(index.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        table_N = gradient.new_zeros(ctx.rows)
        return table_N.index_add_(0, index.reshape(-1), gradient.reshape(-1)), None


def _full(part: Tensor) -> Tensor:
    """In single precision at least, whatever autocast made of it."""
    return part.float() if part.dtype in (torch.bfloat16, torch.float16) else part


def _fast(rows: Tensor, index: Tensor) -> bool:
    return rows.device.type == "cpu" and index.numel() > 0
