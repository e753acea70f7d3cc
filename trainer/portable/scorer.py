"""The whole two-stage model as a function of padded tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.groups import TableGroup
from embeddings.lookup.stored import StoredTable
from trainer.data.batch import RequestBatch
from trainer.model.frame import Pooled, Retrievals, TwoStageModel
from trainer.model.heads.head import HeadOutput
from trainer.model.windows import Windows, windows_of
from trainer.portable.double import doubled, in_double
from trainer.portable.padded import NO_ID, Clustered, PaddedBags, PaddedRequests, Retrieved, widened
from trainer.portable.tables import PortableTables


@dataclass(frozen=True)
class Columns:
    """Which inputs there are.

    Attributes:
        features, context: key -> for each side (behaviors and candidates; requests), the name of its input,
            empty where the side has none.
        many: keys of which there may be any number of ids.
        numbers: inputs of the candidates' numbers, in order; domain: input of the domain, or empty.
        retrieved, clustered: whether the data path brings what a hard search kept, or clusters.
    """

    features: Mapping[str, Sequence[str]]
    context: Mapping[str, Sequence[str]]
    many: frozenset[str]
    numbers: Sequence[str]
    domain: str = ""
    retrieved: bool = False
    clustered: bool = False


RETRIEVED = ("retrieved_place", "retrieved_level", "retrieved_rank")
CLUSTERED = ("cluster_size", "cluster_time", "cluster_until", "cluster_end")


class PortableScorer(nn.Module):
    """Padded tensors -> probabilities, float32 [B, C, T], 0 for candidates that are padding.

    All that is computed is done by the modules of the model; here are look-ups of padded ids and the layout.

    Args:
        model: in eval mode; groups, tables: of the snapshot; columns: the inputs.
        names: of the inputs, in the order in which they are given.
    """

    def __init__(
        self,
        model: TwoStageModel,
        groups: Mapping[str, TableGroup],
        tables: Mapping[str, StoredTable],
        columns: Columns,
        names: Sequence[str],
    ) -> None:
        super().__init__()
        self.branches, self.pooling = model.branches, model.pooling
        self.head = in_double(model.head)
        self.products, self.looked_up = model.products, [*model.first, *model.late]
        self.of_requests = list(model.of_requests)
        self.tables, self.columns, self.names = PortableTables(groups, tables), columns, list(names)
        # So many places of padding that a search, or a window of the newest, always finds enough of them.
        settings = [branch.settings for branch in model.branches.named().values()]
        self.more = max(1, *(max(each.k, each.newest) for each in settings))

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        batch, features, context = self._laid_out(given)
        first = {name: self.tables.of_bags(name, features) for name in self.looked_up}
        if context is not None:
            first |= {name: self.tables.of_bags(name, context) for name in self.of_requests}
        windows: dict[tuple[int, bool], Windows] = {}
        retrievals = {}
        for name, branch in self.branches.named().items():
            looks_at = branch.settings.newest, branch.settings.clusters
            if looks_at not in windows:
                windows[looks_at] = windows_of(
                    batch, self.branches.history_length, *looks_at, seconds=self.branches.seconds
                )
            retrievals[name] = branch.retrieve(batch, first, windows[looks_at])
        found = Retrievals(self.branches, retrievals, None, None, None)
        pooled: Pooled = self.pooling(batch, found, first, {})
        output: HeadOutput = self.head(doubled(pooled.given[0]))
        if self.products is not None:
            output = self.products(output)
        candidates = given["candidate_length"]
        place = torch.arange(self._candidates(given))
        probability = output.logits.sigmoid().unflatten(0, (candidates.shape[0], place.shape[0]))
        return torch.where((place < candidates[:, None])[:, :, None], probability.float(), 0.0)

    def _candidates(self, given: Mapping[str, Tensor]) -> int:
        """C."""
        sides = self.columns.features.values()
        name = next((side[1] for side in sides if side[1]), None) or next(iter(self.columns.numbers))
        return given[name].shape[1]

    def _laid_out(self, given: Mapping[str, Tensor]) -> tuple[RequestBatch, PaddedBags, PaddedBags | None]:
        """The batch, and the padded ids of behaviors and candidates, and of requests."""
        columns, candidates = self.columns, self._candidates(given)
        times = widened(given["history_timestamp"], self.more)
        requests, width = times.shape
        ids = {}
        for key, (history, candidate) in columns.features.items():
            padding = NO_ID if key in columns.many else 0
            of_behaviors = widened(given[history], self.more, padding).flatten(0, 1) if history else None
            ids[key] = [of_behaviors, given[candidate].flatten(0, 1) if candidate else None]
        features = PaddedBags(ids, (requests * width, requests * candidates))
        context = None
        if columns.context:
            of_requests = {key: [given[name]] for key, (name,) in columns.context.items()}
            context = PaddedBags(of_requests, (requests,))
        numbers = [given[name] for name in columns.numbers]
        padded = PaddedRequests(
            given["history_length"],
            times,
            given["request_timestamp"],
            candidates,
            torch.stack(numbers, dim=2) if numbers else torch.zeros(requests, candidates, 0),
            given[columns.domain] if columns.domain else None,
            self._retrieved(given) if columns.retrieved else None,
            self._clustered(given) if columns.clustered else None,
        )
        return padded.batch(features, context), features, context

    def _retrieved(self, given: Mapping[str, Tensor]) -> Retrieved:
        place, level, rank = (given[name] for name in RETRIEVED)
        more = (0, self.more)
        return Retrieved(F.pad(place, more, value=NO_ID), F.pad(level, more), F.pad(rank, more))

    def _clustered(self, given: Mapping[str, Tensor]) -> Clustered:
        size, time, until = (widened(given[name], self.more) for name in CLUSTERED[:3])
        return Clustered(size, time, until, given[CLUSTERED[3]])
