"""The trainer's own model over only those rows that some requests touch.

What the trainer says of a few requests needs the rows of their ids, not the tables: here the same model is
sharded by the same planner over tables that hold those rows and no others, and ids are renumbered to match.
So a model can be asked on a machine that could never hold it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.groups import TableGroup
from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import local_shards
from trainer.assemble import build_sharded
from trainer.config.tables import TableConfig
from trainer.data.batch import RequestBatch
from trainer.log.schema import LogManifest
from trainer.model.windows import Selection
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config


@dataclass
class RequestRows:
    """The ids that requests hold, and the rows of them in each table once they have passed by.

    Attributes:
        ids: feature -> ids, ascending; rows: table name -> float rows [ids, dim].
    """

    ids: dict[str, Tensor]
    rows: dict[str, Tensor]

    def watch(self, features: Mapping[str, str], table: str, first: int, band: Tensor) -> None:
        """Pick what is wanted of rows [first, first + n) of a table; `features`: table name -> feature."""
        ids = self.ids[features[table]]
        begin, end = torch.searchsorted(ids, torch.tensor([first, first + band.shape[0]])).tolist()
        if table not in self.rows:
            self.rows[table] = torch.empty(ids.numel(), band.shape[1])
        self.rows[table][begin:end] = band[ids[begin:end] - first].float()


def rows_of_requests(
    batches: Iterable[RequestBatch], groups: Mapping[str, TableGroup], config: Config
) -> RequestRows:
    """Find the ids of some requests."""
    rows = {table.feature: table.rows for group in groups.values() for table in group.tables}
    # Id 0 has a meaning of its own, and what ids tell apart (groups of candidates in time, domains that have
    # modules of their own) stays as it is.
    grouping = {branch.time_group for branch in config.model.all_branches().values()} | {config.data.domain}
    ids = {f: torch.arange(n if f in grouping else 1) for f, n in rows.items()}
    for batch in batches:
        for kjt in (batch.features, batch.context):
            if kjt is None:
                continue
            for feature in ids.keys() & set(kjt.keys()):
                ids[feature] = torch.cat([ids[feature], kjt[feature].values()]).unique()
    return RequestRows(ids, {})


class PartialModel:
    """Scores requests as the trainer does; for requests that `rows_of_requests` was shown.

    Args:
        dense: the dense part of the model's state dict; requests: with all rows in place.
    """

    def __init__(
        self,
        config: Config,
        manifest: LogManifest,
        ranks: Ranks,
        dense: Mapping[str, Tensor],
        requests: RequestRows,
    ) -> None:
        self._ids, self.device = requests.ids, ranks.device
        features, context = dict(manifest.features), dict(manifest.context)
        for infos in (features, context):
            for name in infos.keys() & requests.ids.keys():
                infos[name] = infos[name].model_copy(update={"rows": requests.ids[name].numel()})
        small = manifest.model_copy(update={"features": features, "context": context})
        # The folder of tables that are larger than memory may be another machine's.
        plan = config.plan.model_copy(update={"mapped_folder": None})
        tables = {name: TableConfig() for name in config.tables}
        partial = config.without_lanes().model_copy(update={"tables": tables, "plan": plan})
        sharded = build_sharded(partial, small, ranks).model
        self.model: DistributedModelParallel = sharded
        state = sharded.state_dict()
        for name, weight in state.items():
            if name.startswith("collections."):
                rows = requests.rows[table_of(name)]
                for part, row, column in local_shards(weight):
                    part.copy_(rows[row : row + part.shape[0], column : column + part.shape[1]])
            else:
                weight.copy_(dense[name])
        sharded.load_state_dict(state)
        sharded.eval()

    @torch.no_grad()
    def put(self, dense: Mapping[str, Tensor]) -> None:
        """Give it other dense weights."""
        own: dict[str, Tensor] = self.model.module.dense_tensors()
        for name, weight in dense.items():
            own[name].copy_(weight)

    def renumbered(self, batch: RequestBatch) -> RequestBatch:
        """The batch with the ids that the small tables have."""
        context = None if batch.context is None else self._renumber(batch.context)
        return replace(batch, features=self._renumber(batch.features), context=context)

    @torch.no_grad()
    def score(self, batch: RequestBatch) -> Tensor:
        """Probabilities, float32 [C, T]."""
        scores: Tensor = self.model(self.renumbered(batch).to(self.device)).logits.sigmoid().cpu()
        return scores

    @torch.no_grad()
    def search(self, batch: RequestBatch) -> dict[str, Selection]:
        """What each branch's search keeps; behaviors are those of the batch as it was."""
        found: dict[str, Selection] = self.model.module.search(self.renumbered(batch).to(self.device))
        return found

    def _renumber(self, kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
        values = [
            torch.searchsorted(self._ids[key], kjt[key].values()) if key in self._ids else kjt[key].values()
            for key in kjt.keys()  # noqa: SIM118 - no dict
        ]
        return KeyedJaggedTensor(
            keys=kjt.keys(),
            values=torch.cat(values),
            lengths=kjt.lengths(),
            stride=kjt.stride(),
            length_per_key=kjt.length_per_key(),
        )
