"""The newest K behaviors: a recent window module."""

from __future__ import annotations

from typing import Any

from trainer.model.retrieve.all import AllSearch


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
