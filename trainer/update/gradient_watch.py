"""How hard the two roles pull at each table, and whether they pull the same way (DARE, section 2).

Every n-th step, the gradient of a row is told apart by role. Reported are, of each table and of all tables of
a group together:

* `norm`: the mean over rows of the Euclidean norm of a row's gradient, by role. A row that a role leaves
  alone counts with 0, as in DARE's analysis of gradient domination.
* `cosine`: the mean over the rows that both roles pull at of the cosine of their gradients; of groups that
  serve both roles. `conflict.rows` is the share of these rows whose cosine is negative, `conflict.steps` the
  share of watched steps whose mean cosine is (DARE's measure of conflict).

Rows are those that a step looks up, at most 1,024 of a feature: the ones with the smallest hashes of seed,
step and id. So they are the same on any number of ranks. Gradients are those of the loss of the whole step,
before any rounding or clipping. No training bit depends on whether a step is watched.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from embeddings.groups import TableName
from embeddings.ids.hashing import hashed
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.update.role_gradients import ROLES, RoleGradient, RoleGradients, of_tables

# Rows of a feature that are looked at in one step.
_SAMPLE = 1024


class GradientWatch:
    """Watches every n-th step.

    Args:
        model: the model itself, without what wraps it for training.
        every: n; world_size: ranks; seed: `train.seed`.
    """

    def __init__(self, model: TwoStageModel, every: int, world_size: int, seed: int) -> None:
        self._gradients, self._groups = RoleGradients(model), model.lookups.groups
        self._every, self._world_size, self._seed = every, world_size, seed
        self._keys = sorted({table.key for group in self._groups.values() for table in group.tables})
        self._taken: list[RoleGradient] | None = None
        self._found: list[dict[str, Any]] = []

    @contextmanager
    def watching(self, number: int) -> Iterator[None]:
        """The forward pass of step `number` is within this; `collect` is called after its backward pass."""
        self._taken = None
        if number % self._every:
            yield
            return
        with self._gradients.taking() as self._taken:
            yield

    @torch.no_grad()
    def collect(self, batch: RequestBatch, number: int) -> None:
        """Look at the gradients of a step, if it is watched; collective."""
        taken, self._taken = self._taken, None
        if taken is None:
            return
        rows = self._draw(batch, number)
        tables = of_tables(taken, self._groups, rows)
        if self._world_size > 1:
            parts = [part for roles in tables.values() for part in roles.values()]
            whole = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(whole)
            for part, total in zip(parts, whole.split([part.numel() for part in parts]), strict=True):
                # TorchRec averages over ranks, see `trainer.objectives.losses.rank_loss`.
                part.copy_(total.view_as(part) / self._world_size)
        self._found.append(measured(tables))

    def entry(self) -> dict[str, Any]:
        """What is reported of the watched steps since the last report; empty where there are none."""
        found, self._found = self._found, []
        return {"gradients": mean_of(found)} if found else {}

    def _draw(self, batch: RequestBatch, number: int) -> dict[str, Tensor]:
        """Key -> rows that are looked at, ascending, the same on all ranks."""
        sources = [each for each in (batch.features, batch.context) if each is not None]
        ids = {key: source[key].values() for source in sources for key in source.keys()}  # noqa: SIM118
        salt = int(hashed(np.array([(self._seed << 32) + number]))[0] >> np.uint64(1))
        drawn = torch.full((len(self._keys), _SAMPLE), -1, dtype=torch.int64)
        for row, key in zip(drawn, self._keys, strict=True):
            some = smallest(ids[key].cpu().long().numpy(), salt)
            row[: len(some)] = torch.from_numpy(some)
        device = batch.labels.device
        if self._world_size > 1:
            mine = drawn.to(device)
            everywhere = mine.new_empty(self._world_size * mine.shape[0], mine.shape[1])
            dist.all_gather_into_tensor(everywhere, mine)
            drawn = everywhere.view(self._world_size, *mine.shape).transpose(0, 1).flatten(1).cpu()
        return {
            key: torch.from_numpy(np.sort(smallest(row[row >= 0].numpy(), salt))).to(device)
            for key, row in zip(self._keys, drawn, strict=True)
        }


def smallest(ids: np.ndarray[Any, Any], salt: int, count: int = _SAMPLE) -> np.ndarray[Any, Any]:
    """Those of the distinct ids whose hashes are smallest, at most `count`; `salt`: below 2^63."""
    distinct = np.unique(ids)
    return distinct[np.argsort(hashed(hashed(distinct) ^ np.uint64(salt)), kind="stable")[:count]]


def measured(tables: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What one step says: see the head of this file.

    Args:
        tables: table -> role -> gradients of the same rows, [R, dim].
    """
    norms: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    cosines: dict[str, list[Tensor]] = defaultdict(list)
    for table, of_roles in tables.items():
        name = TableName.of(table)
        assert name is not None
        units = f"groups.{name.group}", table
        lengths = {role: rows.norm(dim=1) for role, rows in of_roles.items()}
        for unit in units:
            for role, length in lengths.items():
                norms[unit][role].append(length)
        if len(of_roles) == len(ROLES):
            cosine = row_cosines(*of_roles.values())
            for unit in units:
                cosines[unit].append(cosine)
    found: dict[str, Any] = {"norm": {}, "cosine": {}, "rows": {}}
    for unit, roles in norms.items():
        found["norm"][unit] = {
            role: float(torch.cat(parts).mean()) for role, parts in roles.items() if any(map(len, parts))
        }
    for unit, parts in cosines.items():
        rows = torch.cat(parts)
        found["cosine"][unit], found["rows"][unit] = _mean(rows), _mean((rows < 0).double())
    return found


def row_cosines(one_RD: Tensor, other_RD: Tensor) -> Tensor:
    """The cosines of the rows of two matrices, [X], of the X rows that are zero in neither."""
    lengths = one_RD.norm(dim=1) * other_RD.norm(dim=1)
    both = lengths > 0
    cosine: Tensor = (one_RD[both] * other_RD[both]).sum(1) / lengths[both]
    return cosine


def mean_of(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What several watched steps say together; what none of them has seen is left out."""
    norms: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    cosines, rows = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    for step in steps:
        for unit, roles in step["norm"].items():
            for role, norm in roles.items():
                norms[unit][role].append(norm)
        for unit, cosine in step["cosine"].items():
            # No row was pulled at by both roles.
            if not math.isnan(cosine):
                cosines[unit].append(cosine)
                rows[unit].append(step["rows"][unit])
    return {
        "norm": {
            unit: {role: fmean(found) for role, found in roles.items()} for unit, roles in norms.items()
        },
        "cosine": {unit: fmean(found) for unit, found in cosines.items()},
        "conflict": {
            unit: {"rows": fmean(rows[unit]), "steps": fmean(cosine < 0 for cosine in found)}
            for unit, found in cosines.items()
        },
        "steps": len(steps),
    }


def _mean(values: Tensor) -> float:
    """NaN where there are none."""
    return float(values.mean()) if values.numel() else math.nan
