"""Behaviors that share an id with the candidate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.config.model import BranchKeys
from trainer.model.retrieve.search import Query, Search, lowest_costs


class HardKeys(BranchKeys):
    """What a branch may set besides, for the search `hard`."""

    match: str = ""
    """The feature that `hard` compares. If behaviors or candidates have several ids of it, one in common is
    enough."""


class HardSearch(Search):
    """The newest K behaviors that share an id with the candidate (its category, say), then the newest others.

    This is the mask of DARE's `TWIN hard`, which fills up with other behaviors; SIM's hard search, which does
    not, is `data.search` with one level. Id 0, unknown, matches nothing in either.
    """

    keys = HardKeys
    ids_key = "match"

    @classmethod
    def problem(cls, settings: Any) -> str:
        return "" if settings.match else 'search = "hard" needs match, the feature to compare'

    @classmethod
    def export_obstacle(cls, settings: Any) -> str:
        return f'search = "{settings.search}" compares ids'

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
        return lowest_costs(torch.where(same, 0, 1), windows, self.k)
