"""A linear map for each group of rows: every row goes through the map of its group.

Work and memory are those of one map for all rows, besides the maps themselves, however many groups there are.
Rows of a group are laid side by side, so that each stretch of them is one product:

    plain    `plain_linear_by_group`  a copy of its map for every row: [C, out, in]
    CPU      stretches as long as the groups: one product a group that has rows
    device   blocks of equal length, the last one of a group filled up with zeros: one product of all blocks.
             How many there may be follows from C and N, so that the host need not ask how long groups are.
             At most C zeros are added, or 256 a group, and a block has a copy of its map: C / 256 + N copies,
             or 2 N where groups are small.

Forms differ by rounding alone (property test). Neither adds in an order that depends on threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.model.ops.bags import rows_at
from trainer.model.ops.traced import is_traced

# Rows of a block: enough that copies of maps are few beside the rows, and zeros are few beside both.
_BLOCK = 256


@dataclass(frozen=True)
class Layout:
    """Rows of one group side by side.

    Attributes:
        source: int64 [X], the row that lies at each place, C where there is none; place: int64 [C], its
            inverse.
        groups: int64 [Y], the group of each stretch of places.
        lengths: of these stretches where the host knows them; empty: they are blocks of one length.
    """

    source: Tensor
    place: Tensor
    groups: Tensor
    lengths: Sequence[int] = ()


@dataclass(frozen=True)
class Groups:
    """The group of each of C rows: int64 [C], below `count`."""

    of_row: Tensor
    count: int

    @cached_property
    def layout(self) -> Layout:
        """Of the device's form; laid out once for all maps of these rows."""
        return stretches(self) if self.of_row.device.type == "cpu" else blocks(self)


def linear_by_group(x_CW: Tensor, weight_NOW: Tensor, bias_NO: Tensor, groups: Groups) -> Tensor:
    """weight[g] x + bias[g] with the group g of each row -> [C, out]."""
    if is_traced():
        # Stretches and blocks are as many as the numbers in the tensor say.
        return plain_linear_by_group(x_CW, weight_NOW, bias_NO, groups)
    return linear_by_layout(x_CW, weight_NOW, bias_NO, groups.layout)


def plain_linear_by_group(x_CW: Tensor, weight_NOW: Tensor, bias_NO: Tensor, groups: Groups) -> Tensor:
    """`linear_by_group` by a copy of its map for every row."""
    weight_COW = rows_at(weight_NOW.flatten(1), groups.of_row).unflatten(1, weight_NOW.shape[1:])
    bias_CO1 = rows_at(bias_NO, groups.of_row)[:, :, None]
    return torch.baddbmm(bias_CO1, weight_COW, x_CW[:, :, None]).squeeze(2)


def linear_by_layout(x_CW: Tensor, weight_NOW: Tensor, bias_NO: Tensor, layout: Layout) -> Tensor:
    """`linear_by_group` of rows that lie like this."""
    pads = not layout.lengths
    x_XW: Tensor = _Moved.apply(x_CW, layout.source, layout.place, pads, False)  # type: ignore[no-untyped-call]
    weight_YOW = rows_at(weight_NOW.flatten(1), layout.groups).unflatten(1, weight_NOW.shape[1:])
    bias_YO = rows_at(bias_NO, layout.groups)
    if pads:
        x_YBW = x_XW.unflatten(0, (len(weight_YOW), -1)) if len(weight_YOW) else x_XW[:, None]
        out_XO = torch.baddbmm(bias_YO[:, None], x_YBW, weight_YOW.transpose(1, 2)).flatten(0, 1)
    else:
        each = zip(x_XW.split(layout.lengths), weight_YOW.unbind(), bias_YO.unbind(), strict=True)
        out_XO = torch.cat([F.linear(*part) for part in each])
    out_CO: Tensor = _Moved.apply(out_XO, layout.place, layout.source, False, pads)  # type: ignore[no-untyped-call]
    return out_CO


def stretches(groups: Groups) -> Layout:
    """The CPU's form."""
    counts = torch.bincount(groups.of_row, minlength=groups.count).tolist()
    # One at least, so that weights have a gradient where nobody is there.
    present = [group for group, count in enumerate(counts) if count] or [0]
    order = groups.of_row.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return Layout(order, place, torch.tensor(present), [counts[group] for group in present])


def blocks(groups: Groups) -> Layout:
    """The device's form; the host waits for nothing."""
    of_row, count, device = groups.of_row, groups.count, groups.of_row.device
    rows = len(of_row)
    length = max(1, min(_BLOCK, rows // count))
    # Each group has one block at most that is not full.
    number = min(rows, rows // length + min(count, rows))
    sorted_C, order = of_row.sort(stable=True)
    every_N = torch.arange(count, device=device)
    start_N = torch.searchsorted(sorted_C, every_N)
    size_N = torch.searchsorted(sorted_C, every_N, right=True) - start_N
    blocks_N = (size_N + length - 1).div(length, rounding_mode="floor")
    after_N = blocks_N.cumsum(0)
    shift_N = (after_N - blocks_N) * length - start_N
    at_C = torch.arange(rows, device=device) + shift_N.index_select(0, sorted_C)
    source = torch.full((number * length,), rows, device=device).scatter_(0, at_C, order)
    place = torch.empty_like(order).scatter_(0, order, at_C)
    of_block = torch.searchsorted(after_N, torch.arange(number, device=device), right=True)
    return Layout(source, place, of_block.clamp(max=count - 1))


class _Moved(torch.autograd.Function):
    """rows[index], where no row is read twice, and the gradient of it: gradient[back].

    So neither direction adds anything up. An index may be one past the last row, which is 0, where it `pads`.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, back: Tensor, pads: bool, pads_back: bool) -> Tensor:
        ctx.save_for_backward(back)
        ctx.pads = pads_back
        return _rows(rows, index, pads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (back,) = ctx.saved_tensors
        return _rows(gradient, back, ctx.pads), None, None, None, None


def _rows(rows: Tensor, index: Tensor, pads: bool) -> Tensor:
    return (F.pad(rows, (0, 0, 0, 1)) if pads else rows).index_select(0, index)
