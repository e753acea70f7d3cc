"""Sums and products over the rows that candidates keep, in Triton: no [C, K, D] in either direction.

No atomics: every number is written by one program that adds in a fixed order, so the same input gives the
same bits. Offsets into rows are 64 bits wide. Imported only where a kernel runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.model.ops.kernels import power_of_two

# Numbers of a tile: eight a thread of one warp.
_TILE = 256
# Uses of a row that are added at once.
_USES = 8


@triton.jit(do_not_specialize=["pairs", "k"])
def products_kernel(
    part, rows, index, out, pairs, k, D: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr
):
    """out[c, k] = <part[c], rows[index[c, k]]>; a program takes some pairs (c, k)."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    d = tl.arange(0, WIDE)
    real = pair < pairs
    inside = real[:, None] & (d < D)[None, :]
    row = tl.load(index + pair, mask=real, other=0)
    of_row = tl.load(rows + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    of_part = tl.load(part + (pair // k)[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(out + pair, tl.sum(of_row * of_part, 1), mask=real)


@triton.jit(do_not_specialize=["candidates", "k"])
def bags_kernel(
    rows, index, weight, out, candidates, k, D: tl.constexpr, WIDE: tl.constexpr, BAGS: tl.constexpr
):
    """out[c] = sum over k of weight[c, k] * rows[index[c, k]]; a program takes some candidates."""
    candidate = tl.program_id(0).to(tl.int64) * BAGS + tl.arange(0, BAGS)
    d = tl.arange(0, WIDE)
    real = candidate < candidates
    inside = real[:, None] & (d < D)[None, :]
    total = tl.zeros([BAGS, WIDE], tl.float32)
    for j in tl.range(0, k, num_stages=3):
        row = tl.load(index + candidate * k + j, mask=real, other=0)
        by = tl.load(weight + candidate * k + j, mask=real, other=0.0)
        total += by[:, None] * tl.load(rows + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(out + candidate[:, None] * D + d[None, :], total, mask=inside)


# fmt: off
@triton.jit(do_not_specialize=["count", "k"])
def gathered_kernel(
    part, weight, order, first, out, count, k,
    D: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, USES: tl.constexpr,
):
    """out[r] = sum of weight[use] * part[candidate of the use] over the uses of row r, the sorted pairs
    from first[r] to before first[r + 1]; a program takes some rows, and some uses of each at once."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDE)
    real = row < count
    begin = tl.load(first + row, mask=real, other=0)
    end = tl.load(first + row + 1, mask=real, other=0)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    for j in range(0, tl.max(end - begin), USES):
        use = begin[:, None] + j + tl.arange(0, USES)[None, :]
        of_row = use < end[:, None]
        pair = tl.load(order + use, mask=of_row, other=0)
        by = tl.load(weight + pair, mask=of_row, other=0.0)
        inside = of_row[:, :, None] & (d < D)[None, None, :]
        of_part = tl.load(part + (pair // k)[:, :, None] * D + d[None, None, :], mask=inside, other=0.0)
        total += tl.sum(by[:, :, None] * of_part, 1)
    tl.store(out + row[:, None] * D + d[None, :], total, mask=real[:, None] & (d < D)[None, :])
# fmt: on


def products(part_CD: Tensor, rows_ND: Tensor, index_CK: Tensor) -> Tensor:
    """<part[c], rows[index[c, k]]>, [C, K]."""
    out = part_CD.new_empty(index_CK.shape)
    wide = power_of_two(part_CD.shape[1])
    pairs, k, at_once = index_CK.numel(), index_CK.shape[1], max(_TILE // wide, 1)
    with torch.cuda.device_of(part_CD):
        products_kernel[(-(-pairs // at_once),)](
            part_CD.contiguous(), rows_ND.contiguous(), index_CK.contiguous(), out, pairs, k,
            D=part_CD.shape[1], WIDE=wide, PAIRS=at_once, num_warps=1,
        )  # fmt: skip
    return out


def bags(rows_ND: Tensor, index_CK: Tensor, weight_CK: Tensor) -> Tensor:
    """sum_k weight[c, k] * rows[index[c, k]] -> [C, D]."""
    (candidates, k), dim = index_CK.shape, rows_ND.shape[1]
    out = rows_ND.new_empty(candidates, dim)
    wide = power_of_two(dim)
    at_once = max(_TILE // wide, 1)
    with torch.cuda.device_of(rows_ND):
        bags_kernel[(-(-candidates // at_once),)](
            rows_ND.contiguous(), index_CK.contiguous(), weight_CK.contiguous(), out, candidates, k,
            D=dim, WIDE=wide, BAGS=at_once, num_warps=1,
        )  # fmt: skip
    return out


def gathered(part_CD: Tensor, weight_CK: Tensor, index_CK: Tensor, rows: int) -> Tensor:
    """For each row, the sum of weight[c, k] * part[c] over the (c, k) that index it: [rows, D].

    Pairs of weight zero, all that a mask has left out among them, are sorted behind the last row.
    """
    weight_CK, dim = weight_CK.contiguous(), part_CD.shape[1]
    used = torch.where(weight_CK != 0, index_CK, rows).flatten()
    uses = torch.sort(used.to(torch.int32) if rows < 2**31 else used, stable=True)
    each = torch.arange(rows + 1, dtype=uses.values.dtype, device=used.device)
    first = torch.searchsorted(uses.values, each)
    out = part_CD.new_empty(rows, dim)
    wide = power_of_two(dim)
    at_once = max(4 * _TILE // (_USES * wide), 1)
    with torch.cuda.device_of(part_CD):
        gathered_kernel[(-(-rows // at_once),)](
            part_CD.contiguous(), weight_CK, uses.indices, first, out, rows, index_CK.shape[1],
            D=dim, WIDE=wide, ROWS=at_once, USES=_USES, num_warps=1,
        )  # fmt: skip
    return out
