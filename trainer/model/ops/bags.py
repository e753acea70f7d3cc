"""Sums and products over a few rows of a matrix each, and rows by their places.

`weighted_bags`, `dots` and `rows_at` choose among forms (property tests of values and gradients):

    plain, device   `plain_...`  torch's own operators. Their backward passes add in a fixed order on CUDA:
                    they sort by row first, where index_select, gather and scatter_add add as threads come
                    by.
    kernels         on a device, where `trainer.model.ops.kept_rows` says that they fit.
    CPU             torch's own backward passes add row by row there, or first build all C x K rows. The
                    gradient of a sum over rows, sorted by row, is a sum again: every row gathers from the
                    candidates that used it. No [C, K, D] intermediate in either direction.
    exported        products of matrices, since portable runtimes have no weighted sum over bags.

Sums are in single precision at least, also where autocast halves products. Shapes: index_CK int64, K rows
of rows_ND for each of C candidates; the order of additions is fixed, so that the same input gives the same
bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from embeddings.private import bag_weights_gradient
from trainer.model.ops import kept_rows
from trainer.model.ops.precision import full, in_single_precision
from trainer.model.ops.traced import is_traced


def weighted_bags(rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """sum_k weight[c, k] * rows[index[c, k]] -> [C, D]."""
    rows_ND, weight_CK = full(rows_ND), full(weight_CK)
    if is_traced():
        return (weight_CK.unsqueeze(1) @ F.embedding(index_CK, rows_ND)).squeeze(1)
    if kept_rows.pays(rows_ND, index_CK):
        return kept_rows.weighted_bags(rows_ND, index_CK, weight_CK)
    if not _by_cpu(rows_ND, index_CK):
        with in_single_precision(rows_ND.device):
            return plain_weighted_bags(rows_ND, index_CK, weight_CK)
    if not torch.is_grad_enabled():
        # The same without a node of the graph.
        return plain_weighted_bags(rows_ND, index_CK, weight_CK)
    out: Tensor = kept_rows.WeightedBags.apply(_CPU, rows_ND, index_CK, weight_CK)  # type: ignore[no-untyped-call]
    return out


def dots(query_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    """<query[c], rows[index[c, k]]> -> [C, K]."""
    query_CD, rows_ND = full(query_CD), full(rows_ND)
    if is_traced():
        return plain_dots(query_CD, rows_ND, index_CK)
    if kept_rows.pays(rows_ND, index_CK):
        return kept_rows.dots(query_CD, rows_ND, index_CK)
    if not _by_cpu(rows_ND, index_CK):
        with in_single_precision(rows_ND.device):
            return plain_dots(query_CD, rows_ND, index_CK)
    if not torch.is_grad_enabled():
        return _products(query_CD, rows_ND, index_CK)
    out: Tensor = kept_rows.Dots.apply(_CPU, query_CD, rows_ND, index_CK)  # type: ignore[no-untyped-call]
    return out


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index] for an index of any shape: rows [M, ...] -> [*index.shape, ...]."""
    if is_traced() or not _by_cpu(rows, index):
        return plain_rows_at(rows, index)
    return rows.index_select(0, index.reshape(-1)).view(*index.shape, *rows.shape[1:])


def plain_weighted_bags(rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """`weighted_bags` by torch's own operator."""
    return F.embedding_bag(index_CK, rows_ND, per_sample_weights=weight_CK, mode="sum")


def plain_dots(query_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    """`dots` from all rows, [C, K, D]."""
    return (F.embedding(index_CK, rows_ND) @ query_CD.unsqueeze(2)).squeeze(2)


def plain_rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """`rows_at` by a lookup.

    On a CPU the backward pass of index_select adds in the order of the index too, to the same bits, at half
    the cost, and a twentieth where a row is one number; elsewhere only this one has a fixed order. That of
    rows[index] adds in whatever order the threads come by.
    """
    return F.embedding(index, rows.flatten(1) if rows.dim() > 1 else rows[:, None]).view(
        *index.shape, *rows.shape[1:]
    )


def _gathered(part_CD: Tensor, weight_CK: Tensor, index_CK: Tensor, rows: int) -> Tensor:
    flat = index_CK.reshape(-1)
    uses = torch.bincount(flat, minlength=rows)
    # A radix sort: as many passes as the numbers have bytes.
    narrow = flat.to(torch.int16 if rows <= torch.iinfo(torch.int16).max else torch.int32)
    order = torch.sort(narrow, stable=True).indices
    return F.embedding_bag(
        order.div(weight_CK.shape[1], rounding_mode="floor"),
        part_CD,
        F.pad(uses.cumsum(0), (1, 0)),
        mode="sum",
        per_sample_weights=weight_CK.reshape(-1)[order],
        include_last_offset=True,
    )


def _products(part_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    # The operator that gives embedding_bag the gradient of its weights.
    candidates, k = index_CK.shape
    each = torch.arange(candidates, device=index_CK.device)
    out: Tensor = bag_weights_gradient(
        part_CD.contiguous(), rows_ND, index_CK.reshape(-1), each * k, each.repeat_interleave(k), 0
    )
    return out.view(candidates, k)


_CPU = kept_rows.Operators(plain_weighted_bags, _products, _gathered)


def _by_cpu(rows: Tensor, index: Tensor) -> bool:
    """Which form: the CPU's there, unless there is nothing to add up."""
    return rows.device.type == "cpu" and index.numel() > 0
