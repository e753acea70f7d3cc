"""No search: every candidate keeps its whole window, of all behaviors or of the newest."""

from __future__ import annotations

from typing import Any

import torch

from trainer.model.retrieve.search import Query, Search
from trainer.model.windows import Selection


class AllSearch(Search):
    """No search: stage two attends to the whole window (DIN, TIN)."""

    uses = frozenset()
    keeps_all = True
    takes_clusters = True

    @classmethod
    def missed_share(cls, settings: Any, behaviors: float, candidates: int, requests: float) -> float:
        return 0.0

    @classmethod
    def export_obstacle(cls, settings: Any) -> str:
        return f'search = "{settings.search}" keeps everything'

    @torch.no_grad()
    def forward(self, query: Query) -> Selection:
        return query.windows.of_candidates()


class RecentSearch(AllSearch):
    """The windows hold the newest K behaviors alone, and each candidate keeps all of them."""

    uses = frozenset({"k"})
    takes_clusters = False

    @classmethod
    def newest(cls, settings: Any) -> int:
        return int(settings.k)

    @classmethod
    def missed_share(cls, settings: Any, behaviors: float, candidates: int, requests: float) -> float:
        return float(max(0.0, 1 - settings.k * requests))

    @classmethod
    def export_obstacle(cls, settings: Any) -> str:
        return f'search = "{settings.search}" takes the newest behaviors, whatever they are'
