"""Scores and sums of the rows that candidates keep, on a device, without a [C, K, D] in either direction.

torch's lookup writes all C x K rows, reads them for the product, and does the same with their gradients. The
kernels of `kept_rows_triton` read rows where they lie. The gradient of rows is a sum over the uses of each,
sorted by row, in a fixed order: the same input gives the same bits, with torch's deterministic algorithms or
without. The plain forms are those of `trainer.model.ops.bags`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.model.ops.kernels import agrees, has_kernel

# Width of a row.
_WIDEST = 512
# Uses of a row on average. Where few rows serve all, a table of time encodings say, one program would add up
# the uses of a row one after the other.
_MOST_USES = 64


def pays(rows_ND: Tensor, index_CK: Tensor) -> bool:
    """Whether the kernels are to be used."""
    device = rows_ND.device
    return has_kernel(device) and fits(rows_ND, index_CK) and agrees(same_as_plain, "kept rows", device)


def same_as_plain(device: torch.device) -> bool:
    """Whether values and gradients of whole numbers, which are exact in any order, are those of plain torch.

    Waits for the device.
    """
    rng = torch.Generator().manual_seed(0)
    index = torch.randint(0, 40, (7, 5), generator=rng).to(device)
    rows, query, weight, outer = (
        torch.randint(-3, 4, shape, generator=rng).float().to(device)
        for shape in ((40, 12), (7, 12), (7, 5), (7, 12))
    )
    sides = []
    with torch.enable_grad():
        for plain in (False, True):
            given = [part.clone().requires_grad_() for part in (rows, query, weight)]
            if plain:
                looked_up = F.embedding(index, given[0])
                product = (looked_up * given[1][:, None]).sum(2)
                bag = (looked_up * given[2][:, :, None]).sum(1)
            else:
                product, bag = dots(given[1], given[0], index), weighted_bags(given[0], index, given[2])
            total = (product * weight).sum() + (bag * outer).sum()
            sides.append([product, bag, *torch.autograd.grad(total, given)])
    return all(torch.equal(mine, theirs) for mine, theirs in zip(*sides, strict=True))


def fits(rows_ND: Tensor, index_CK: Tensor) -> bool:
    """Whether the kernels can work on these: float32, rows of whole 16 bytes, no table of few rows."""
    (rows, dim), pairs = rows_ND.shape, index_CK.numel()
    return (
        rows_ND.dtype == torch.float32
        and 0 < dim <= _WIDEST
        and dim % 4 == 0
        and index_CK.dim() == 2
        and 0 < pairs <= _MOST_USES * rows
        and pairs < 2**31
    )


def dots(query_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    """<query[c], rows[index[c, k]]> -> [C, K]; `fits` must hold."""
    out: Tensor = Dots.apply(_kernels(), query_CD, rows_ND, index_CK)  # type: ignore[no-untyped-call]
    return out


def weighted_bags(rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """sum_k weight[c, k] * rows[index[c, k]] -> [C, D]; `fits` must hold.

    A row whose weight is zero gets no gradient from it, not even where that would be NaN.
    """
    out: Tensor = WeightedBags.apply(_kernels(), rows_ND, index_CK, weight_CK)  # type: ignore[no-untyped-call]
    return out


class Operators(NamedTuple):
    """What values and gradients of both operators are made of, for a device.

    Attributes:
        bags: of rows [N, D], index and weight [C, K]: sum_k weight[c, k] * rows[index[c, k]], [C, D].
        products: of part [C, D], rows and index: <part[c], rows[index[c, k]]>, [C, K].
        gathered: of part, weight, index and N: for each row, the sum of weight[c, k] * part[c] over its uses,
            those (c, k) that index it, [N, D].
    """

    bags: Callable[[Tensor, Tensor, Tensor], Tensor]
    products: Callable[[Tensor, Tensor, Tensor], Tensor]
    gathered: Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _kernels() -> Operators:
    from trainer.model.ops import kept_rows_triton

    return Operators(kept_rows_triton.bags, kept_rows_triton.products, kept_rows_triton.gathered)


class Dots(torch.autograd.Function):
    """`dots` by given operators."""

    @staticmethod
    def forward(ctx: Any, by: Operators, query_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(query_CD, rows_ND, index_CK)
        return by.products(query_CD, rows_ND, index_CK)

    @staticmethod
    def backward(ctx: Any, gradient_CK: Tensor) -> tuple[None, Tensor | None, Tensor | None, None]:
        query_CD, rows_ND, index_CK = ctx.saved_tensors
        of_query = of_rows = None
        if ctx.needs_input_grad[1]:
            of_query = ctx.by.bags(rows_ND, index_CK, gradient_CK.contiguous())
        if ctx.needs_input_grad[2]:
            of_rows = ctx.by.gathered(query_CD, gradient_CK, index_CK, rows_ND.shape[0])
        return None, of_query, of_rows, None


class WeightedBags(torch.autograd.Function):
    """`weighted_bags` by given operators."""

    @staticmethod
    def forward(ctx: Any, by: Operators, rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
        ctx.by = by
        ctx.save_for_backward(rows_ND, index_CK, weight_CK)
        return by.bags(rows_ND, index_CK, weight_CK)

    @staticmethod
    def backward(ctx: Any, gradient_CD: Tensor) -> tuple[None, Tensor | None, None, Tensor | None]:
        rows_ND, index_CK, weight_CK = ctx.saved_tensors
        of_rows = of_weights = None
        if ctx.needs_input_grad[1]:
            of_rows = ctx.by.gathered(gradient_CD, weight_CK, index_CK, rows_ND.shape[0])
        if ctx.needs_input_grad[3]:
            of_weights = ctx.by.products(gradient_CD, rows_ND, index_CK)
        return None, of_rows, None, of_weights
