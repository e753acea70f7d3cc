"""The exact top K by inner products: of stage two's scorer, or of an index of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from trainer.model.retrieve import window_search_cpu
from trainer.model.retrieve.score import DotScorer, twin_projections
from trainer.model.retrieve.search import Query, Search, best_columns
from trainer.model.sizes import BranchSizes


class DotSearch(Search):
    """Exact top-K by the scorer of stage two (TWIN, DARE); several heads share the K places round-robin."""

    by_score = True
    takes_clusters = True

    @classmethod
    def export_obstacle(cls, settings: Any) -> str:
        if settings.score == "mlp":
            return 'score = "mlp" is no dot product'
        encoded = settings.time == "encoding" and "scores" in settings.time_in
        return 'time = "encoding" enters the vectors themselves' if encoded else ""

    def held(self, query: Query) -> int:
        few = window_search_cpu.pays(query.scorer, query.vectors, query.windows)
        return 0 if few else super().held(query)

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        return best_columns(query, self.k, self.doubt(query))


class SoftSearch(Search):
    """SIM's soft search: inner product of two linear maps, trained by its own auxiliary loss only."""

    uses = frozenset({"k", "head_dim"})
    by_score = True
    needs_vectors = True
    auxiliary = "index"
    own_scorer = "search.index"

    def __init__(self, k: int, width: int, dim: int) -> None:
        super().__init__(k)
        self.index = DotScorer(*twin_projections(width, 1, dim), 1, None, None)

    @classmethod
    def build(cls, settings: Any, sizes: BranchSizes) -> SoftSearch:
        return cls(settings.k, sizes.width, settings.head_dim)

    @classmethod
    def export_obstacle(cls, settings: Any) -> str:
        return ""

    def of_behaviors(self, key_ND: Tensor) -> dict[str, Tensor]:
        assert self.index.key is not None
        return {"index": self.index.key(key_ND)}

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        # The scorer of the branch has other keys.
        assert self.index.key is not None
        known = {"key": query.raw.known_or("index", self.index.key)}
        raw = replace(query.raw, known=known)
        own = replace(query, scorer=self.index, vectors=self.index.encode(raw))
        # The index knows neither cross features nor sizes of clusters.
        return best_columns(own, self.k, self.doubt(own))
