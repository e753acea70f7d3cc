"""The exact top K by the scorer of stage two (TWIN, DARE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainer.model.retrieve.search import Query, Search, best_columns


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

    def columns(self, query: Query) -> tuple[Tensor, Tensor]:
        return best_columns(query, self.k, self.doubt(query))
