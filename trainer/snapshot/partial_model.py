"""The trainer's own model over only those rows that some requests touch.

What the trainer says of a few requests needs the rows of their ids, not the tables: here the same model is
sharded by the same planner over tables that hold those rows and no others, and ids are renumbered to match.
So a model can be asked on a machine that could never hold it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

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
from trainer.data.living_ids import Finder, looked_up
from trainer.log.schema import LogManifest
from trainer.model.windows import Selection
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config


@dataclass
class RequestRows:
    """The ids that requests hold, and the rows of them in each table once they have passed by.

    Attributes:
        ids: key that tables are looked up by -> ids, ascending; rows: table name -> float rows [ids, dim].
        parts: key of a map within that of a feature -> for each of the feature's ids, the one of this key.
    """

    ids: dict[str, Tensor]
    rows: dict[str, Tensor]
    parts: dict[str, Tensor] = field(default_factory=dict)

    def of_table(self, table: str, key: str) -> Tensor:
        """The rows of a table for each of its feature's ids."""
        if key not in self.parts:
            return self.rows[table]
        return self.rows[table][torch.searchsorted(self.ids[key], self.parts[key])]

    def watch(self, keys: Mapping[str, str], table: str, first: int, band: Tensor) -> None:
        """Pick what is wanted of rows [first, first + n) of a table; `keys`: table name -> its key."""
        ids = self.ids[keys[table]]
        begin, end = torch.searchsorted(ids, torch.tensor([first, first + band.shape[0]])).tolist()
        if table not in self.rows:
            self.rows[table] = torch.empty(ids.numel(), band.shape[1])
        self.rows[table][begin:end] = band[ids[begin:end] - first].float()


def rows_of_requests(
    batches: Iterable[RequestBatch],
    groups: Mapping[str, TableGroup],
    config: Config,
    whole: Collection[str] = (),
) -> RequestRows:
    """Find the ids of some requests; where ids come and go, batches have rows in their place.

    Args:
        whole: features all of whose ids are taken: parts of encoded numbers, whose few rows the encoder says.
    """
    rows = {table.key: table.rows for group in groups.values() for table in group.tables}
    features = {
        table.key: table.feature for group in groups.values() for table in group.tables if table.apart
    }
    rows |= {feature: config.id_rules[feature].rows for feature in features.values()}
    # Id 0 has a meaning of its own, and what ids tell apart (groups of candidates in time, domains that have
    # modules of their own) stays as it is.
    grouping = {branch.time_group for branch in config.model.all_branches().values()}
    grouping |= {config.data.domain, *whole}
    ids = {key: torch.arange(n if key in grouping else 1) for key, n in rows.items()}
    pairs: dict[str, list[Tensor]] = {key: [] for key in features}
    for batch in batches:
        for kjt in (batch.features, batch.context):
            if kjt is None:
                continue
            there = ids.keys() & set(kjt.keys())
            for key in there:
                ids[key] = torch.cat([ids[key], kjt[key].values()]).unique()
            for key in pairs.keys() & there:
                pair = torch.stack([kjt[features[key]].values(), kjt[key].values()])
                pairs[key].append(pair.unique(dim=1).contiguous())
    found = RequestRows(ids, {})
    for key, several in pairs.items():
        part = torch.zeros_like(ids[features[key]])
        for of_feature, own in several:
            part[torch.searchsorted(ids[features[key]], of_feature)] = own
        found.parts[key] = part
    return found


class PartialModel:
    """Scores requests as the trainer does; for requests that `rows_of_requests` was shown.

    Args:
        dense: the dense part of the model's state dict; requests: with all rows in place.
        id_maps: of the features whose ids come and go; batches that are scored have ids of the log.
    """

    def __init__(
        self,
        config: Config,
        manifest: LogManifest,
        ranks: Ranks,
        dense: Mapping[str, Tensor],
        requests: RequestRows,
        id_maps: Mapping[str, Finder] | None = None,
    ) -> None:
        self._ids, self._id_maps, self.device = requests.ids, id_maps or {}, ranks.device
        features, context = dict(manifest.features), dict(manifest.context)
        for infos in (features, context):
            for name in infos.keys() & requests.ids.keys():
                update = {"rows": requests.ids[name].numel(), "raw": False}
                infos[name] = infos[name].model_copy(update=update)
        small = manifest.model_copy(update={"features": features, "context": context})
        # The folder of tables that are larger than memory may be another machine's.
        plan = config.plan.model_copy(update={"mapped_folder": None})
        tables = {name: TableConfig() for name in config.tables}
        # The small tables have a row for each id here, so no map is needed any more.
        partial = config.without_lanes().model_copy(update={"tables": tables, "plan": plan, "ids": {}})
        built = build_sharded(partial, small, ranks)
        sharded = built.model
        keys = {
            group.table_name(table): (table.feature, config.own_keys(name)[0])
            for name, group in built.groups.items()
            for table in group.tables
        }
        self.model: DistributedModelParallel = sharded
        state = sharded.state_dict()
        for name, weight in state.items():
            if name.startswith("collections."):
                table = table_of(name)
                feature, own = keys[table]
                rows = requests.of_table(table, own.get(feature, feature))
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
        batch = looked_up(
            batch, {name: each for name, each in self._id_maps.items() if not each.rules.within}
        )
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
