"""The K best behaviors of each candidate's window by inner products: which form, and the plain one.

On a device the plain form gathers every window's keys, [W, X, D], writes all scores, [C, X], and ranks them:
the copy alone moves three times what the search must read. `window_search_triton` reads the keys once and
writes what is kept. It is chosen where it can work and is never needed for being right.

Shapes as in `trainer.model.windows`; K is at most X.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.ops.bags import rows_at
from trainer.model.ops.kernels import agrees, has_kernel, power_of_two
from trainer.model.ops.top import top_columns
from trainer.model.retrieve.score import AttentionVectors, DotScorer, Scorer
from trainer.model.time import Marks
from trainer.model.windows import Windows

# Widths of a key, and K, that fit the registers of a program.
_WIDEST, _MOST_KEPT = 256, 256
# Columns of a program, at least and at most; the scores of all are held in registers. Few warps with many
# scores a thread are better than many: what a step of the search for the bound costs besides is paid by each.
_SHORTEST, _LONGEST = 256, 1024
# Candidates that a key is multiplied with once it is read.
_TOGETHER = 4
# Floats of a tile of keys for each warp.
_TILE = 1024
# What the spans of a window may leave over for a candidate, which one program ranks.
_MOST_LEFT = 8192
# Programs of a launch.
_MOST_PROGRAMS = 2**31 - 1


@dataclass(frozen=True)
class Cut:
    """How the work is cut into programs: each window into spans of columns, its candidates into tiles.

    Attributes:
        wide: D up to a power of two.
        together, tiles: candidates of a program, and such tiles of the window with most candidates.
        columns, steps: of a tile of keys, and tiles of a span, both powers of two.
        spans: of a window; warps: of a program.
    """

    wide: int
    together: int
    tiles: int
    columns: int
    steps: int
    spans: int
    warps: int

    @staticmethod
    def of(dim: int, width: int, candidates: int) -> Cut:
        """For windows of `width` columns that have at most so many candidates."""
        span = min(max(power_of_two(width), _SHORTEST), _LONGEST)
        wide = power_of_two(max(dim, 4))
        warps = 1 if span == _SHORTEST else 2
        columns = min(_TILE * warps // wide, span)
        tiles = -(-candidates // _TOGETHER)
        return Cut(wide, -(-candidates // tiles), tiles, columns, span // columns, -(-width // span), warps)


def pays(scorer: Scorer, vectors: AttentionVectors, windows: Windows, k: int) -> bool:
    """Whether the kernel is to be used: scores are inner products of one head plus what a window shares."""
    return (
        has_kernel(vectors.key_ND.device)
        and isinstance(scorer, DotScorer)
        and scorer.heads == 1
        and scorer.shares_bias
        and fits(vectors.query_CD, vectors.key_ND, windows, k)
        and agrees(same_as_plain, "search", vectors.key_ND.device)
    )


@torch.no_grad()
def same_as_plain(device: torch.device) -> bool:
    """Whether both forms keep the same of windows of whole numbers, whose scores are exact in any order.

    Many are equal, and one window is cut into several spans. Waits for the device.
    """
    rng, lengths = torch.Generator().manual_seed(0), torch.tensor([1500, 0, 300])
    dim, k, column = 8, 5, torch.arange(1500)
    mask = column < lengths[:, None]
    index = torch.where(mask, lengths.cumsum(0)[:, None] - 1 - column, 0)
    of_candidate = torch.tensor([0, 0, 0, 1, 2])
    key = torch.randint(-2, 3, (1800, dim), generator=rng).float()
    query = torch.randint(-2, 3, (5, dim), generator=rng).float()
    bias = torch.where(mask, torch.randint(0, 3, mask.shape, generator=rng).float(), -torch.inf)
    none = torch.zeros_like(index)
    index, mask, none, lengths, of_candidate, key, query, bias = (
        part.to(device) for part in (index, mask, none, lengths, of_candidate, key, query, bias)
    )
    for of_stretches in (lengths, None):
        windows = Windows(
            index, mask, Marks(none, none, none), None, of_candidate, of_stretches, counts=(3, 1, 1)
        )
        for added in (bias, None):
            kernel = best_columns(query, key, windows, added, k)
            plain = plain_best_columns(query, key, windows, added, k)
            if not all(torch.equal(mine, theirs) for mine, theirs in zip(kernel, plain, strict=True)):
                return False
    return True


def fits(query_CD: Tensor, key_ND: Tensor, windows: Windows, k: int) -> bool:
    """Whether the kernel can work on these: float32, rows of whole 16 bytes, few enough columns."""
    (count, width), dim = windows.index.shape, key_ND.shape[1]
    if not (key_ND.dtype == query_CD.dtype == torch.float32 and 0 < dim <= _WIDEST and dim % 4 == 0):
        return False
    cut = Cut.of(dim, width, max((1, *windows.host_counts)))
    programs = count * cut.tiles * cut.spans
    return 0 < k <= _MOST_KEPT and cut.spans * k <= _MOST_LEFT and programs <= _MOST_PROGRAMS


def best_columns(
    query_CD: Tensor, key_ND: Tensor, windows: Windows, bias_WX: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The K best columns of each candidate's window by <query, key> + bias, by the kernel.

    What is kept is what `top_columns` keeps of these scores, which are sums in single precision in an order
    that depends on D alone. No tensor is asked for a number. `fits` must hold.

    Args:
        query_CD, key_ND: float32.
        windows: keys of a window are rows `index`, or where `lengths` are known those before `index[:, 0]`.
        bias_WX: float32, -inf where a column is masked; None = nothing is added.

    Returns:
        int64 and bool, both [C, min(K, X)]: ascending; columns that do not count are X - 1.
    """
    k, (candidates, dim), width = min(k, windows.index.shape[1]), query_CD.shape, windows.index.shape[1]
    if not candidates:
        none = torch.zeros(0, k, dtype=torch.int64, device=query_CD.device)
        return none, none.bool()
    from trainer.model.retrieve import window_search_triton

    cut = Cut.of(dim, width, max(windows.host_counts))
    return window_search_triton.best_columns(query_CD, key_ND, windows, bias_WX, k, cut)


def plain_best_columns(
    query_CD: Tensor, key_ND: Tensor, windows: Windows, bias_WX: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    """The same by torch's own operators, for any device and any windows."""
    if bias_WX is None:
        bias_WX = torch.zeros(windows.index.shape, device=key_ND.device).masked_fill(
            ~windows.mask, -torch.inf
        )
    slots = windows.slots
    key_WXD = rows_at(key_ND, windows.index)
    score = torch.baddbmm(bias_WX[:, None], slots.spread(query_CD), key_WXD.transpose(1, 2))
    return top_columns(slots.collect(score), k)
