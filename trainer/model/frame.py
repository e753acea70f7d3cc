"""The two-stage model: roles -> search -> sequence model -> head.

TWIN and DARE are the same code: four roles, each served by a named table group. With one group for all
roles this is TWIN as DARE's authors ran it; with one group for attention and one for representation, DARE.
Other models are other branches (`trainer.model.branch`) of the same frame.

TorchRec's train pipelines trace the forward pass of every module that holds a sharded one, to start the
exchange of a later batch's ids early. So `TwoStageModel.forward` calls collections and modules without
collections, and looks into no tensor. The trace does not enter those modules; all else happens inside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.lookup.jagged import select_bags
from trainer.config.tasks import Task
from trainer.data.batch import RequestBatch
from trainer.model.border import Lookups
from trainer.model.branch import Branch, at_least_one_row
from trainer.model.heads.head import HeadInput, HeadSizes
from trainer.model.read.sequence import Behaviors
from trainer.model.retrieve.search import Retrieval
from trainer.model.settings import ModelConfig
from trainer.model.sizes import Dimensions
from trainer.model.union import most_kept, padded_union, union_of
from trainer.model.windows import Selection, Windows, windows_of


class Prediction(NamedTuple):
    """What the model says of C candidates and T tasks.

    Attributes:
        logits: float32 [C, T], log odds of each task's probability.
        auxiliary: logits [C, T] of the auxiliary head while training, else None.
        base, experts: of `trainer.model.heads.head.HeadOutput`.
    """

    logits: Tensor
    auxiliary: Tensor | None
    base: Tensor | None = None
    experts: Tensor | None = None


class Retrievals(NamedTuple):
    """Stage one's result for all branches.

    Attributes:
        branches: that retrieved; of_branch: name -> its retrieval.
        bags: KJT of the behaviors that any branch kept and maybe others, then the candidates: what is looked
            up for stage two. None where all of them were looked up already.
        place_N: where each of the batch's behaviors is among `bags`; None: behavior n is at n.
    """

    branches: Branches
    of_branch: dict[str, Retrieval]
    bags: KeyedJaggedTensor | None
    place_N: Tensor | None


class Branches(nn.ModuleDict):
    """The branches of a model, by name; called, they do stage one.

    Args:
        branches: by name; history_length: L.
        selects: behaviors are looked up again, as far as they are kept.
        pads: some others are too, see `trainer.model.union`; None: where the device is not the CPU.
    """

    def __init__(
        self, branches: Mapping[str, Branch], history_length: int, selects: bool, pads: bool | None = None
    ) -> None:
        super().__init__(branches)
        self.history_length, self.selects, self.pads = history_length, selects, pads

    def named(self) -> dict[str, Branch]:
        """Name -> branch."""
        return {name: branch for name, branch in self.items() if isinstance(branch, Branch)}

    def forward(self, batch: RequestBatch, vectors: Mapping[str, Tensor]) -> Retrievals:
        """`vectors`: [N + C, width] of the groups that are looked up first."""
        windows: dict[tuple[int, bool], Windows] = {}
        retrievals = {}
        for name, branch in self.named().items():
            looks_at = branch.settings.newest, branch.settings.clusters
            if looks_at not in windows:
                windows[looks_at] = windows_of(batch, self.history_length, *looks_at)
            retrievals[name] = branch.retrieve(batch, vectors, windows[looks_at])
        if not self.selects:
            return Retrievals(self, retrievals, None, None)
        kept = [each.windows if each.whole else each.selection for each in retrievals.values()]
        device = batch.behavior_time.device
        if device.type != "cpu" if self.pads is None else self.pads:
            # More behaviors than were kept are looked up again, so that the host need not wait.
            most = []
            for name, branch in self.named().items():
                whole = retrievals[name].whole or not branch.settings.searches
                k = None if whole else retrievals[name].selection.index.shape[1]
                most.append((branch.settings.newest, k))
            rows = padded_union(kept, batch.behaviors, most_kept(batch.host_sizes, most))
            if rows is None:
                return Retrievals(self, retrievals, batch.features, None)
        else:
            rows = union_of(kept, batch.behaviors)
        behavior_S, place_N = rows
        candidates = batch.behaviors + torch.arange(batch.candidates, device=device)
        bags = select_bags(batch.features, torch.cat([behavior_S, candidates]), batch.host_sizes.one_id)
        return Retrievals(self, retrievals, bags, place_N)


class Pooling(nn.Module):
    """Stage two of all branches, and what the head is given besides.

    Args:
        context: the group of context features, empty without them; numbers: whether candidates have any.
    """

    def __init__(self, context: str, numbers: bool) -> None:
        super().__init__()
        self.context, self.numbers = context, numbers

    def forward(
        self,
        batch: RequestBatch,
        retrievals: Retrievals,
        first: Mapping[str, Tensor],
        late: Mapping[str, Tensor],
    ) -> tuple[HeadInput, Branch, Behaviors]:
        """-> what the head is given; the main branch and what its first expert read.

        `first`: of all behaviors and candidates, and of the context; `late`: of `retrievals.bags`.
        """
        parts: list[Tensor] = []
        beside: list[Tensor] = []
        read: dict[str, Behaviors] = {}
        branches = retrievals.branches.named()
        # Rows of each group: target [C, D], behaviors [S, D].
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        # Not a set: ranks exchange the gradients of these slices, all in the same order.
        groups = [group for branch in branches.values() for group in representation_of(branch)]
        for name in dict.fromkeys(groups):
            vectors = late[name] if name in late else first[name]
            count = vectors.shape[0] - batch.candidates
            rows[name] = vectors[count:], at_least_one_row(vectors[:count])
        for name, branch in branches.items():
            retrieval = retrievals.of_branch[name]
            weight_CHK = branch.weigh(retrieval)
            for expert in branch.experts:
                place = retrieval.index
                if expert.behavior in late and retrievals.place_N is not None:
                    place = retrievals.place_N[place]
                target_CD, value_SD = rows[expert.target][0], rows[expert.behavior][1]
                behaviors = Behaviors(**vars(retrieval), target_CD=target_CD, value_SD=value_SD, place=place)
                read.setdefault(name, behaviors)
                parts += expert.sequence(behaviors, weight_CHK)
        if self.numbers:
            beside.append(batch.numeric.sign() * batch.numeric.abs().log1p())
        if self.context:
            beside.append(first[self.context][batch.candidate_request])
        return HeadInput({"": parts}, beside), branches["main"], read["main"]


class TwoStageModel(nn.Module):
    """Scores the candidates of a RequestBatch.

    Args:
        config: the model section.
        dimensions: groups, L, levels of the hard search, seed.
        collections: group name -> module that maps a KJT of stride B to a KeyedTensor of [B, width];
            an EmbeddingBagCollection in training, plain tables when scoring.
        tasks: what it predicts, T in number.
        numbers: X, numeric features of a candidate; they reach the head as sign(x) log(1 + |x|).
    """

    def __init__(
        self,
        config: ModelConfig,
        dimensions: Dimensions,
        collections: Mapping[str, nn.Module],
        tasks: Sequence[Task],
        numbers: int = 0,
    ) -> None:
        super().__init__()
        self.tasks, self.domains = tuple(tasks), dimensions.domains
        self.config, self.numbers, groups, roles = config, numbers, dimensions.groups, config.roles
        self.collections = nn.ModuleDict(collections)
        self.lookups = Lookups(groups)
        branches = {name: Branch(branch, dimensions) for name, branch in config.all_branches().items()}
        self.first, self.late = first_and_late(config.lookup == "full", branches.values())
        self.branches = Branches(branches, dimensions.history_length, selects=bool(self.late))
        self.pooling = Pooling(roles.context, numbers > 0)
        widths = [
            sum(expert.sequence.output_width for expert in branch.experts) for branch in branches.values()
        ]
        beside = numbers + (groups[roles.context].width if roles.context else 0)
        self.head = config.head_kind.build(config, HeadSizes({"": widths}, beside, tasks))
        self.auxiliary = None
        if config.auxiliary_kind is not None:
            width = groups[roles.representation_target].width
            self.auxiliary = config.auxiliary_kind.build(config, width, len(tasks))
        if config.dense_init == "normal":
            # Everything dense without "bias" in its name, scales and slopes too (DARE's code).
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if not name.startswith("collections.") and "bias" not in name:
                        parameter.normal_(0.0, 0.01)

    def forward(self, batch: RequestBatch) -> Prediction:
        retrievals, first = self._stage_one(batch)
        late = {}
        if self.late:
            # A collection takes from the bags those of its own features.
            late = self.lookups({name: self.collections[name](retrievals.bags) for name in self.late})
        given, main, behaviors = self.pooling(batch, retrievals, first, late)
        output = self.head(given)
        auxiliary = None
        if self.auxiliary is not None and self.training:
            auxiliary = self.auxiliary(main, behaviors)
        return Prediction(output.logits, auxiliary, output.base, output.experts)

    @torch.no_grad()
    def search(self, batch: RequestBatch) -> dict[str, Selection]:
        """Stage one alone: what each branch keeps of the batch."""
        return {name: retrieval.selection for name, retrieval in self.retrieve(batch).items()}

    @torch.no_grad()
    def retrieve(self, batch: RequestBatch) -> dict[str, Retrieval]:
        """The same, with the windows that each branch searched and the vectors it scored."""
        return self._stage_one(batch)[0].of_branch

    def _stage_one(self, batch: RequestBatch) -> tuple[Retrievals, dict[str, Tensor]]:
        """What each branch kept, and the vectors that were looked up for it."""
        # All are started before any is waited for.
        pooled = {name: self.collections[name](batch.features) for name in self.first}
        if self.config.roles.context:
            pooled[self.config.roles.context] = self.collections[self.config.roles.context](batch.context)
        vectors = self.lookups(pooled)
        return self.branches(batch, vectors), vectors


def representation_of(branch: Branch) -> list[str]:
    """Groups that a branch's experts read."""
    return [group for expert in branch.experts for group in (expert.target, expert.behavior)]


def first_and_late(full: bool, branches: Iterable[Branch]) -> tuple[list[str], list[str]]:
    """Groups looked up for all behaviors and candidates before the search, and those looked up after it.

    `full`: groups of the representation are of the first kind too.
    """
    first, late = [], []
    for branch in branches:
        roles = branch.settings.roles
        first += [roles.attention_target, roles.attention_behavior] if branch.settings.attend != () else []
        first += [roles.cross] if roles.cross else []
        late += representation_of(branch)
    first = list(dict.fromkeys(first + late if full else first))
    return first, [name for name in dict.fromkeys(late) if name not in first]
