"""Stage one (GSU): which K behaviors of its window a candidate keeps.

A search maps scores, marks or ids of a window to its columns. It runs without gradient and in single
precision: stage two computes the kept scores again with gradient, from the same vectors, by the same
scorer. Half precision would rank by rounding, and each form of a product by another rounding.

In training on a device that is not the CPU, no search asks a tensor for a number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.ops.precision import in_single_precision, is_halved
from trainer.model.ops.signs import sign_bits
from trainer.model.ops.top import Doubt, ascending, top_columns
from trainer.model.retrieve import window_search
from trainer.model.retrieve.exact import PairScores
from trainer.model.retrieve.score import Attended, DotScorer, Scorer, twin_projections
from trainer.model.retrieve.slices import columns_of_slices, pays
from trainer.model.windows import Kept, Windows


@dataclass(frozen=True)
class Query:
    """What a search may look at.

    Attributes:
        scorer, vectors: of stage two, encoded; raw: the attention vectors before that.
        windows: where to search.
        ids_C, ids_N: ids that a hard search matches, or None: [C], or [C, ids] where there may be several.
    """

    scorer: Scorer
    vectors: Attended
    raw: Attended
    windows: Windows
    ids_C: Tensor | None = None
    ids_N: Tensor | None = None

    def doubt(self) -> Doubt:
        """What a ranking by the scorer's rounded scores must ask for."""
        return PairScores(self.scorer, self.raw, self.vectors, self.windows).doubt()


class Search(nn.Module):
    """Args: k: K, behaviors kept."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    @torch.no_grad()
    def forward(self, query: Query) -> Kept:
        """-> the kept behaviors, [C, K]. What is kept for a candidate depends on it and its window alone."""
        device = query.windows.index.device
        again = is_halved(device)
        with in_single_precision(device):
            # What autocast made of the vectors is not what is searched.
            return self.kept(replace(query, vectors=query.scorer.encode(query.raw)) if again else query)

    def kept(self, query: Query) -> Kept:
        """`forward` of vectors in single precision, without autocast."""
        column, mask = self.columns(query)
        missing = self.k - column.shape[1]
        return query.windows.columns(F.pad(column, (0, missing)), F.pad(mask, (0, missing)))

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        """-> columns of the windows, at most K a candidate, ascending, and which of them count."""
        raise NotImplementedError

    def doubt(self, query: Query) -> Doubt | None:
        """What a ranking by rounded scores must ask for; None where the rounded scores decide.

        They do in training on a device that is not the CPU, since each question makes the host wait for it.
        Among scores as close as rounding the choice then depends on the batch; it is the same in the same
        batch. In evaluation, export and scoring the exact scores decide on every device, so that a request
        is scored alike in any company.
        """
        if self.training and query.windows.index.device.type != "cpu":
            return None
        return query.doubt()


class DotSearch(Search):
    """Exact top-K by the scorer of stage two (TWIN, DARE); several heads share the K places round-robin."""

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        return best_columns(query, self.k, self.doubt(query))


def best_columns(query: Query, k: int, doubt: Doubt | None) -> tuple[Tensor, Tensor]:
    """Columns of the K best by the query's scorer, in the form that serves these windows on their device."""
    scorer, vectors, windows = query.scorer, query.vectors, query.windows
    if doubt is None and window_search.pays(scorer, vectors, windows, k):
        return _columns_at_once(query, k)
    if isinstance(scorer, DotScorer) and doubt is not None and pays(scorer, vectors, windows):
        return columns_of_slices(scorer, vectors, windows, k, doubt)
    return by_product(query, k, doubt)


def by_product(query: Query, k: int, doubt: Doubt | None) -> tuple[Tensor, Tensor]:
    """The plain form, of all scorers on all devices: scores of whole windows, then the best of them."""
    score_CHX = query.scorer.over_windows(query.vectors, query.windows)
    if score_CHX.shape[1] == 1:
        return top_columns(score_CHX[:, 0], k, doubt=doubt)
    return round_robin(score_CHX, k, doubt)


class AllSearch(Search):
    """No search: stage two attends to the whole window (DIN, TIN)."""

    @torch.no_grad()
    def forward(self, query: Query) -> Kept:
        return query.windows.of_candidates()


class HardSearch(Search):
    """The newest K behaviors that share an id with the candidate (its category, say), then the newest others.

    This is the mask of DARE's `TWIN hard`, which fills up with other behaviors; SIM's hard search, which does
    not, is `data.search` with one level. Id 0, unknown, matches nothing in either.
    """

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        assert query.ids_C is not None and query.ids_N is not None
        windows = query.windows
        of_candidate, of_behavior = (
            part if part.dim() == 2 else part[:, None] for part in (query.ids_C, query.ids_N)
        )
        shape = windows.of_candidate.numel(), windows.index.shape[1]
        same = torch.zeros(shape, dtype=torch.bool, device=windows.index.device)
        for ids_N in of_behavior.unbind(1):
            ids_CX = ids_N[windows.index][windows.of_candidate]
            for ids_C in of_candidate.unbind(1):
                same |= (ids_CX == ids_C[:, None]) & (ids_C > 0)[:, None]
        return _best_places(torch.where(same, 0, 1), windows, self.k)


class HammingSearch(Search):
    """ETA: the K behaviors whose SimHash codes differ from the candidate's in the fewest bits.

    Codes are signs of one fixed random projection of the live attention vectors. Nothing is trained and
    nothing is stored, so codes are never stale. A server holds packed codes (`pack_bits`) and counts
    differing bits by XOR and popcount (`hamming`); here the same numbers come from a product of signs, which
    is faster on batches (a test compares them).

    Args:
        k: K; width: D of the vectors; bits: of a code; seed: of the projection.
    """

    planes: Tensor

    def __init__(self, k: int, width: int, bits: int, seed: int) -> None:
        super().__init__(k)
        self.register_buffer("planes", random_planes(width, bits, seed))

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        windows = query.windows
        of_candidate = sign_bits(query.raw.query_CD, self.planes).float() * 2 - 1
        of_behavior = sign_bits(query.raw.key_ND, self.planes).float() * 2 - 1
        # Twice the distance is bits - <signs, signs>: exact small integers, by a matrix product.
        key_WXB = F.embedding(windows.index, of_behavior)
        alike = windows.slots.collect(windows.slots.spread(of_candidate) @ key_WXB.transpose(1, 2))
        return _best_places(-alike.to(torch.int64), windows, self.k)


class SoftSearch(Search):
    """SIM's soft search: inner product of two linear maps, trained by its own auxiliary loss only."""

    def __init__(self, k: int, width: int, dim: int) -> None:
        super().__init__(k)
        self.index = DotScorer(*twin_projections(width, dim), 1, None, None)

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        own = replace(query, scorer=self.index, vectors=self.index.encode(query.raw))
        # The index knows neither cross features nor sizes of clusters.
        return best_columns(own, self.k, self.doubt(own))


def _columns_at_once(query: Query, k: int) -> tuple[Tensor, Tensor]:
    """The K best columns without the windows' vectors side by side, and without asking the device."""
    vectors, windows = query.vectors, query.windows
    bias_WX = query.scorer.window_bias(vectors, windows)
    return window_search.best_columns(vectors.query_CD, vectors.key_ND, windows, bias_WX, k)


def round_robin(score_CHX: Tensor, k: int, doubt: Doubt | None = None) -> tuple[Tensor, Tensor]:
    """Walk the heads' ranked lists in turn, best first, until K different columns are found (TWIN, 4.2)."""
    candidates, heads, width = score_CHX.shape
    lists = (candidates, heads)
    column, real = (
        part.unflatten(0, lists).transpose(1, 2).flatten(1)
        for part in ranked_columns(score_CHX.flatten(0, 1), k, doubt)
    )
    column = torch.where(real, column, width)
    place = column.sort(dim=1, stable=True)
    again = F.pad(place.values[:, 1:] == place.values[:, :-1], (1, 0))
    new = torch.zeros_like(real).scatter(1, place.indices, ~again) & real
    taken = new & (new.cumsum(1) <= k)
    order = torch.where(taken, column, width).sort(dim=1).values[:, : min(k, width)]
    return order.clamp(max=width - 1), order < width


def ranked_columns(score_RX: Tensor, k: int, doubt: Doubt | None = None) -> tuple[Tensor, Tensor]:
    """The K best columns of each row, best first, and which of them count; ties go to the lower column."""
    column, real = top_columns(score_RX, k, doubt=doubt)
    value = score_RX.gather(1, column).masked_fill(~real, -torch.inf)
    ranked = value.sort(dim=1, descending=True, stable=True)
    if doubt is not None and column.shape[1] > 1:
        close = ranked.values[:, :-1] - ranked.values[:, 1:] <= doubt.slack[:, None]
        close = F.pad(close, (0, 1)) | F.pad(close, (1, 0))
        row, place = torch.nonzero(
            torch.zeros_like(real).scatter(1, ranked.indices, close) & real, as_tuple=True
        )
        if row.numel():
            value = value.double()
            value[row, place] = doubt.exact(row, column[row, place])
            order = value.sort(dim=1, descending=True, stable=True).indices
            return column.gather(1, order), real.gather(1, order)
    return column.gather(1, ranked.indices), real.gather(1, ranked.indices)


def _best_places(cost_CX: Tensor, windows: Windows, k: int) -> tuple[Tensor, Tensor]:
    """Lowest integer cost first, then lowest column; the column makes every key different."""
    width = cost_CX.shape[1]
    key = cost_CX * width + torch.arange(width, device=cost_CX.device)
    key = key.masked_fill(~windows.mask[windows.of_candidate], torch.iinfo(torch.int64).max)
    best = key.topk(min(k, width), dim=1, largest=False)
    return ascending(best.indices, best.values < torch.iinfo(torch.int64).max, width)


def random_planes(width: int, bits: int, seed: int) -> Tensor:
    """Gaussian projection [D, bits], the same for the same seed."""
    return torch.randn(width, bits, generator=torch.Generator().manual_seed(seed))


_WORD = 32


def pack_bits(bits_NB: Tensor) -> Tensor:
    """Bool [N, bits] -> int64 [N, words], 32 bits a word."""
    padded = F.pad(bits_NB, (0, -bits_NB.shape[1] % _WORD)).unflatten(1, (-1, _WORD))
    power = 1 << torch.arange(_WORD, device=bits_NB.device)
    words: Tensor = padded.to(torch.int64) * power
    return words.sum(2)


def hamming(some: Tensor, other: Tensor) -> Tensor:
    """Differing bits of packed codes, int64 [..., words] -> [...]: XOR, then popcount by halving sums."""
    x = some ^ other
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    count: Tensor = (x * 0x01010101 >> 24) & 0xFF
    return count.sum(-1)


def search_reference(query: Query, k: int) -> Kept:
    """`DotSearch` of one head, one candidate at a time: the slow reference of the property tests."""
    windows, vectors = query.windows, query.vectors
    column = torch.zeros(vectors.query_CD.shape[0], k, dtype=torch.int64)
    mask = torch.zeros(vectors.query_CD.shape[0], k, dtype=torch.bool)
    everything = windows.of_candidates()
    exact = query.doubt().exact
    for c in range(column.shape[0]):
        seen = torch.nonzero(everything.mask[c]).squeeze(1)
        scores = exact(torch.full_like(seen, c), seen)
        best = seen[scores.argsort(descending=True, stable=True)[:k]].sort().values
        column[c, : best.numel()] = best
        mask[c, : best.numel()] = True
    return windows.columns(column, mask)
