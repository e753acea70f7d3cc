"""Stage one (GSU): which K behaviors of its window a candidate keeps.

A search maps scores, marks or ids of a window to its columns. It runs without gradient and in single
precision: stage two computes the kept scores again with gradient, from the same vectors, by the same
scorer. Half precision would rank by rounding, and each form of a product by another rounding.

In training on a device that is not the CPU, no search asks a tensor for a number. Here is what all have in
common; each search has a file of its own.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.model import BranchKeys
from trainer.model.ops.precision import in_single_precision, is_halved
from trainer.model.ops.ranked_lists import best_first, united
from trainer.model.ops.top import Doubt, ascending, top_columns
from trainer.model.ops.traced import is_traced, traced_top_columns
from trainer.model.retrieve import slices, window_search, window_search_cpu
from trainer.model.retrieve.exact import PairScores
from trainer.model.retrieve.score import AttentionVectors, DotScorer, Scorer
from trainer.model.sizes import BranchSizes
from trainer.model.windows import Selection, Windows


@dataclass(frozen=True)
class Query:
    """What a search may look at.

    Attributes:
        scorer, vectors: of stage two, encoded; raw: the attention vectors before that.
        windows: where to search.
        ids_C, ids_N: ids that a search compares, or None: [C], or [C, ids] where there may be several.
    """

    scorer: Scorer
    vectors: AttentionVectors
    raw: AttentionVectors
    windows: Windows
    ids_C: Tensor | None = None
    ids_N: Tensor | None = None

    def doubt(self) -> Doubt:
        """What a ranking by the scorer's rounded scores must ask for."""
        return PairScores(self.scorer, self.raw, self.vectors, self.windows).doubt()


@dataclass(frozen=True)
class Retrieval:
    """Stage one's result for a branch.

    Attributes:
        windows: that were searched.
        raw: the attention vectors as they were looked up; vectors: as the scorer encoded them.
        selection: the kept behaviors, [C, K]; [C, X] with `whole`; the windows themselves, [W, X], where a
            sequence model works on windows.
        whole: every candidate keeps its whole window, in the order of its columns.
    """

    windows: Windows
    raw: AttentionVectors
    vectors: AttentionVectors
    selection: Selection
    whole: bool

    @property
    def index(self) -> Tensor:
        """Behaviors whose representation stage two wants, each once a window or once a candidate."""
        return self.windows.index if self.whole else self.selection.index

    @property
    def group_C(self) -> Tensor:
        """Target groups of the candidates."""
        return self.raw.group_C


class Search(nn.Module):
    """Chooses the columns of its window that each candidate keeps, and says what must be known of it.

    `settings` are those of a branch, with the keys that this search adds.

    Attributes:
        keys: the settings class of a branch, or a subclass of it with the keys that this search adds.
        uses: keys shared with other kinds that it looks at.
        ids_key: its key that names a feature whose ids it is given; empty = none.
        keeps_all: each candidate keeps its whole window, so that nothing is searched.
        by_score: what it keeps depends on vectors, which a snapshot may round.
        needs_vectors: it cannot work where no feature is attended to.
        takes_clusters: it can search clusters of behaviors.
        auxiliary: the auxiliary loss that alone trains it; empty = it needs none.
        own_scorer: the name, in its branch's state dict, of a scorer of its own with one head; empty = it
            ranks by the branch's scorer or by no score.

    Args:
        k: K, behaviors kept.
    """

    keys: ClassVar[type[BranchKeys]] = BranchKeys
    uses: ClassVar[Set[str]] = frozenset({"k"})
    ids_key: ClassVar[str] = ""
    keeps_all: ClassVar[bool] = False
    by_score: ClassVar[bool] = False
    needs_vectors: ClassVar[bool] = False
    takes_clusters: ClassVar[bool] = False
    auxiliary: ClassVar[str] = ""
    own_scorer: ClassVar[str] = ""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> Search:
        """The search of a branch; `sizes` knows widths and the seed of fixed projections."""
        return cls(settings.k)

    @classmethod
    def problem(cls, settings: Any) -> str:
        """What is wrong with a branch that has this; empty if nothing is."""
        return ""

    @classmethod
    def newest(cls, settings: Any) -> int:
        """How many of the newest behaviors its windows hold; 0 = the whole window."""
        return 0

    @classmethod
    def missed_share(cls, settings: Any, behaviors: float, candidates: int, requests: float) -> float:
        """The share of a block's behaviors that no candidate is expected to keep.

        The default assumes that each candidate chooses K behaviors by itself. A search that keeps the same
        ones for all candidates of a request overrides it, as `RecentSearch` does.

        Args:
            behaviors, candidates: of the block; requests: of the step, for each of its behaviors.
        """
        return float((1 - min(1.0, settings.k / behaviors)) ** candidates)

    @classmethod
    def export_obstacle(cls, settings: Any) -> str:
        """Why it is no search for the largest inner product of stored vectors; empty if it is one."""
        return f'search = "{settings.search}" ranks by no inner product'

    @torch.no_grad()
    def forward(self, query: Query) -> Selection:
        """-> the kept behaviors, [C, K]. What is kept for a candidate depends on it and its window alone."""
        device = query.windows.index.device
        again = is_halved(device)
        with in_single_precision(device):
            # What autocast made of the vectors is not what is searched.
            return self.select(replace(query, vectors=query.scorer.encode(query.raw)) if again else query)

    def select(self, query: Query) -> Selection:
        """`forward` of vectors in single precision, without autocast."""
        column, mask = self.columns(query)
        missing = self.k - column.shape[1]
        return query.windows.columns(F.pad(column, (0, missing)), F.pad(mask, (0, missing)))

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        """What it makes of attention vectors of behaviors whatever the candidates, by name: [N, *] each.

        A search that is given `AttentionVectors.known` finds it there.
        """
        return {}

    def held(self, query: Query) -> int:
        """Scores that `columns` holds at once for each candidate of a window; 0 = few."""
        return query.windows.index.shape[1]

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        """-> columns of the windows, at most K a candidate, ascending, and which of them count."""
        raise NotImplementedError

    def doubt(self, query: Query) -> Doubt | None:
        """What a ranking by rounded scores must ask for; None where the rounded scores decide.

        They do in training on a device that is not the CPU, since each question makes the host wait for it.
        Among scores as close as rounding the choice then depends on the batch; it is the same in the same
        batch. In evaluation, export and scoring the exact scores decide on every device, so that a request is
        scored alike in any company. While a model is exported nothing is asked, for it ranks by exact scores
        alone.
        """
        if is_traced() or (self.training and query.windows.index.device.type != "cpu"):
            return None
        return query.doubt()


def best_columns(query: Query, k: int, doubt: Doubt | None) -> tuple[Tensor, Tensor]:
    """Columns of the K best by the query's scorer, in the form that serves these windows on their device."""
    scorer, vectors, windows = query.scorer, query.vectors, query.windows
    if is_traced():
        return exact_columns(PairScores(scorer, query.raw, vectors, windows), k)
    if doubt is None and window_search.pays(scorer, vectors, windows, k):
        # Without the windows' vectors side by side, and without asking the device.
        bias_WX = scorer.window_bias(vectors, windows)
        return window_search.best_columns(vectors.query_CD, vectors.key_ND, windows, bias_WX, k)
    if isinstance(scorer, DotScorer) and doubt is not None:
        if window_search_cpu.pays(scorer, vectors, windows):
            return window_search_cpu.best_columns(scorer, vectors, windows, k, doubt)
        if slices.pays(scorer, vectors, windows):
            return slices.columns_of_slices(scorer, vectors, windows, k, doubt)
    # The plain form, of all scorers on all devices: scores of whole windows, then the best of them.
    score_CHX = scorer.over_windows(vectors, windows)
    if score_CHX.shape[1] == 1:
        return top_columns(score_CHX[:, 0], k, doubt=doubt)
    return round_robin(score_CHX, k, doubt)


def exact_columns(pairs: PairScores, k: int) -> tuple[Tensor, Tensor]:
    """Columns of the K best by their exact scores alone, for a model that is exported."""
    scores = pairs.of_windows()
    if len(scores) == 1:
        return traced_top_columns(scores[0], k)
    # Each head by itself: all their scores side by side would be a copy of them.
    lists = [ranked_columns(score_CX, k) for score_CX in scores]
    column_CHK, real_CHK = (torch.stack(part, dim=1) for part in zip(*lists, strict=True))
    return united(column_CHK, real_CHK, k, scores[0].shape[1])


def round_robin(score_CHX: Tensor, k: int, doubt: Doubt | None = None) -> tuple[Tensor, Tensor]:
    """Walk the heads' ranked lists in turn, best first, until K different columns are found (TWIN, 4.2)."""
    candidates, heads, width = score_CHX.shape
    lists = (candidates, heads)
    ranked = ranked_columns(score_CHX.flatten(0, 1), k, doubt)
    column_CHK, real_CHK = (part.unflatten(0, lists) for part in ranked)
    return united(column_CHK, real_CHK, k, width)


def ranked_columns(score_RX: Tensor, k: int, doubt: Doubt | None = None) -> tuple[Tensor, Tensor]:
    """The K best columns of each row, best first, and which of them count; ties go to the lower column."""
    top = traced_top_columns if is_traced() else partial(top_columns, doubt=doubt)
    column, real = top(score_RX, k)
    value = score_RX.gather(1, column).masked_fill(~real, -torch.inf)
    order = best_first(value)
    if doubt is not None and column.shape[1] > 1:
        ranked = value.gather(1, order)
        close = ranked[:, :-1] - ranked[:, 1:] <= doubt.slack[:, None]
        close = F.pad(close, (0, 1)) | F.pad(close, (1, 0))
        row, place = torch.nonzero(torch.zeros_like(real).scatter(1, order, close) & real, as_tuple=True)
        if row.numel():
            exact = value.double()
            exact[row, place] = doubt.exact(row, column[row, place])
            # A device would have to be asked which rows these are, so it sorts all.
            rows = row.unique() if row.device.type == "cpu" else slice(None)
            order[rows] = exact[rows].sort(dim=1, descending=True, stable=True).indices
    return column.gather(1, order), real.gather(1, order)


def lowest_costs(cost_CX: Tensor, windows: Windows, k: int) -> tuple[Tensor, Tensor]:
    """Lowest integer cost first, then lowest column; the column makes every key different."""
    width = cost_CX.shape[1]
    key = cost_CX * width + torch.arange(width, device=cost_CX.device)
    key = key.masked_fill(~windows.mask[windows.of_candidate], torch.iinfo(torch.int64).max)
    best = key.topk(min(k, width), dim=1, largest=False)
    return ascending(best.indices, best.values < torch.iinfo(torch.int64).max, width)
