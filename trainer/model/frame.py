"""The two-stage model: roles -> search -> sequence model -> head.

TWIN and DARE are the same code: four roles, each served by a named table group. With one group for all
roles this is TWIN as DARE's authors ran it; with one group for attention and one for representation, DARE.
Other models are other branches (`trainer.model.branch`) of the same frame.

TorchRec's train pipelines trace the forward pass of every module that holds a sharded one, to start the
exchange of a later batch's ids early. So `TwoStageModel.forward` calls collections and modules without
collections, and looks into no tensor. The trace does not enter those modules; all else happens inside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from embeddings.lookup.jagged import select_bags
from trainer.config.model import RolesConfig
from trainer.config.tasks import Task
from trainer.data.batch import RequestBatch
from trainer.model.border import Lookups
from trainer.model.branch import Branch, Reading, at_least_one_row, first_and_late, representation_of
from trainer.model.heads.auxiliary import AuxiliarySizes
from trainer.model.heads.head import HeadInput, HeadOutput, HeadSizes
from trainer.model.heads.owned import OwnedAttention
from trainer.model.heads.products import Products
from trainer.model.heads.retrieval import Retrieved
from trainer.model.known import KnownBehaviors
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
        retrieved: what an auxiliary head gives that is no logits, while training.
    """

    logits: Tensor
    auxiliary: Tensor | None
    base: Tensor | None = None
    experts: Tensor | None = None
    retrieved: Retrieved | None = None


class Retrievals(NamedTuple):
    """Stage one's result for all branches.

    Attributes:
        branches: that retrieved; of_branch: name -> its retrieval.
        bags: KJT of the behaviors that any branch kept and maybe others, then the candidates: what is looked
            up for stage two. None where all of them were looked up already.
        place_N: where each of the batch's behaviors is among `bags`; None: behavior n is at n.
        candidates: KJT of the candidates alone, for a prior that is looked up for nothing else.
    """

    branches: Branches
    of_branch: dict[str, Retrieval]
    bags: KeyedJaggedTensor | None
    place_N: Tensor | None
    candidates: KeyedJaggedTensor | None


class Branches(nn.ModuleDict):
    """The branches of a model, by name; called, they do stage one.

    Args:
        branches: by name; history_length: L.
        selects: behaviors are looked up again, as far as they are kept; alone: candidates without behaviors.
        pads: some others are too, see `trainer.model.union`; None: where the device is not the CPU.

    Attributes:
        few: of so many behaviors of a batch all are looked up again, whether kept or not: a server sets it,
            for which to find the kept ones costs more than to ask for the others.
        ages, seconds: whether any branch reads ages of behaviors, by buckets and to the second.
    """

    def __init__(
        self,
        branches: Mapping[str, Branch],
        history_length: int,
        selects: bool,
        alone: bool = False,
        pads: bool | None = None,
    ) -> None:
        super().__init__(branches)
        self.history_length, self.selects, self.alone, self.pads = history_length, selects, alone, pads
        self.few = 0
        self._named = dict(branches)
        self.seconds = any(branch.settings.sequence_kind.needs_seconds for branch in branches.values())
        self.ages = self.seconds or any(branch.settings.age for branch in branches.values())

    def named(self) -> Mapping[str, Branch]:
        """Name -> branch."""
        return self._named

    def forward(
        self, batch: RequestBatch, vectors: Mapping[str, Tensor], known: KnownBehaviors | None = None
    ) -> Retrievals:
        """`vectors`: [N + C, width] of the groups that are looked up first; [C, width] with `known`."""
        windows: dict[tuple[int, bool], Windows] = {}
        retrievals = {}
        for name, branch in self.named().items():
            looks_at = branch.settings.newest, branch.settings.clusters
            if looks_at not in windows:
                windows[looks_at] = windows_of(batch, self.history_length, *looks_at, self.ages, self.seconds)
            of_branch = None if known is None else known.of_branch[name]
            retrievals[name] = branch.retrieve(batch, vectors, windows[looks_at], of_branch)
        device, one_id = batch.behavior_time.device, batch.host_sizes.one_id
        alone = select_bags(batch.features, bags_of_candidates(batch), one_id) if self.alone else None
        if not (self.selects if known is None else known.selects):
            return Retrievals(self, retrievals, None, None, alone)
        if batch.behaviors <= self.few:
            return Retrievals(self, retrievals, batch.features, None, alone)
        kept = [each.windows if each.whole else each.selection for each in retrievals.values()]
        if device.type != "cpu" if self.pads is None else self.pads:
            # More behaviors than were kept are looked up again, so that the host need not wait.
            most = []
            for name, branch in self.named().items():
                whole = retrievals[name].whole or not branch.settings.searches
                k = None if whole else retrievals[name].selection.index.shape[1]
                most.append((branch.settings.newest, k))
            rows = padded_union(kept, batch.behaviors, most_kept(batch.host_sizes, most))
            if rows is None:
                return Retrievals(self, retrievals, batch.features, None, alone)
        else:
            rows = union_of(kept, batch.behaviors)
        behavior_S, place_N = rows
        bag_S = torch.cat([behavior_S, bags_of_candidates(batch)])
        bags = select_bags(batch.features, bag_S, one_id)
        return Retrievals(self, retrievals, bags, place_N, alone)


def bags_of_candidates(batch: RequestBatch) -> Tensor:
    """Where the candidates are among the bags of a batch, int64 [C]."""
    return batch.behaviors + torch.arange(batch.candidates, device=batch.behavior_time.device)


class Pooled(NamedTuple):
    """Stage two's result for all branches.

    Attributes:
        given: what the head is given, in each of its runs, see `trainer.model.heads.owned`: one run where
            there are no gradients.
        of_branch: name -> what stage two of the branch read.
    """

    given: list[HeadInput]
    of_branch: dict[str, Reading]


class Pooling(nn.Module):
    """Stage two of all branches, and what the head is given besides.

    Args:
        roles: of the model; numbers: whether candidates have any.
        runs: of each run of the head, the branches whose weights pass no gradient on.
    """

    def __init__(self, roles: RolesConfig, numbers: bool, runs: Sequence[Set[str]] = (frozenset(),)) -> None:
        super().__init__()
        self.roles, self.numbers, self.runs = roles, numbers, runs

    def forward(
        self,
        batch: RequestBatch,
        retrievals: Retrievals,
        first: Mapping[str, Tensor],
        late: Mapping[str, Tensor],
        known: KnownBehaviors | None = None,
    ) -> Pooled:
        """`first`: of all behaviors and candidates, and of requests; `late`: of `retrievals.bags`."""
        rows_of = {} if known is None else known.rows
        of_branch: dict[str, Reading] = {}
        branches = retrievals.branches.named()
        # Rows of each group: target [C, D], behaviors [S, D].
        rows: dict[str, tuple[Tensor, Tensor]] = {}
        # Not a set: ranks exchange the gradients of these slices, all in the same order.
        groups = [group for branch in branches.values() for group in representation_of(branch)]
        groups += [self.roles.prior] if self.roles.prior else []
        for name in dict.fromkeys(groups):
            vectors = late[name] if name in late else first[name]
            count = vectors.shape[0] - batch.candidates
            rows[name] = vectors[count:], rows_of.get(name, at_least_one_row(vectors[:count]))
        for name, branch in branches.items():
            retrieval, roles = retrievals.of_branch[name], branch.settings.roles
            place = retrieval.index
            behavior = roles.representation_behavior
            if behavior in late and behavior not in rows_of and retrievals.place_N is not None:
                place = retrievals.place_N.index_select(0, place.flatten()).view(place.shape)
            target_CD, value_SD = rows[roles.representation_target][0], rows[behavior][1]
            behaviors = Behaviors(**vars(retrieval), target_CD=target_CD, value_SD=value_SD, place=place)
            of_branch[name] = Reading(branch, behaviors, branch.weigh(retrieval))
        read: dict[tuple[str, bool], dict[str, list[Tensor]]] = {}
        runs = self.runs if torch.is_grad_enabled() else self.runs[:1]
        of_runs: list[dict[str, list[Tensor]]] = [{} for _ in runs]
        for stopped, sets in zip(runs, of_runs, strict=True):
            for name, reading in of_branch.items():
                stops = name in stopped
                if (name, stops) not in read:
                    read[name, stops] = reading.parts(stops)
                for set_, parts in read[name, stops].items():
                    sets.setdefault(set_, []).extend(parts)
        beside, prior = [], []
        if self.numbers:
            beside.append(batch.numeric.sign() * batch.numeric.abs().log1p())
        if self.roles.context:
            beside.append(first[self.roles.context][batch.candidate_request])
        if self.roles.prior:
            prior.append(rows[self.roles.prior][0])
        if self.roles.prior_context:
            prior.append(first[self.roles.prior_context][batch.candidate_request])
        prior_CP = torch.cat(prior, dim=1) if prior else None
        return Pooled([HeadInput(sets, beside, prior_CP, batch.domain) for sets in of_runs], of_branch)


class TwoStageModel(nn.Module):
    """Scores the candidates of a RequestBatch.

    Args:
        config: the model section.
        dimensions: groups, L, levels of the hard search, seed.
        collections: group name -> module that maps a KJT of stride B to a KeyedTensor of [B, width];
            an EmbeddingBagCollection in training, plain tables when scoring.
        tasks: what it predicts, T in number.
        numbers: X, numeric features of a candidate; they reach the head as sign(x) log(1 + |x|).

    Attributes:
        domains: ids that a domain may have, for losses: more than 0 even where no group has a table of it.
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
        # A prior that serves no other role is looked up for candidates alone.
        self.alone = [roles.prior] if roles.prior and roles.prior not in [*self.first, *self.late] else []
        self.branches = Branches(
            branches, dimensions.history_length, selects=bool(self.late), alone=bool(self.alone)
        )
        self.late += self.alone
        self.of_requests = list(dict.fromkeys(filter(None, (roles.context, roles.prior_context))))
        towers = [task for task in tasks if task.has_tower]
        owners = {name: branch.settings.attention_owner for name, branch in branches.items()}
        gives_experts = config.head_kind.gives_experts(config)
        self.owned = OwnedAttention(owners, [task.name for task in towers], gives_experts)
        self.pooling = Pooling(roles, numbers > 0, self.owned.runs)
        self.head = config.head_kind.build(config, head_sizes(roles, branches, dimensions, towers, numbers))
        self.products = Products(tasks) if len(towers) < len(tasks) else None
        self.auxiliary = None
        if config.auxiliary_kind is not None:
            main = branches["main"]
            sizes = AuxiliarySizes(*main.shared_widths, main.attention_width, [task.name for task in towers])
            self.auxiliary = config.auxiliary_kind.build(config, sizes)
        if config.dense_init == "normal":
            # Everything dense without "bias" in its name, scales and slopes too (DARE's code).
            with torch.no_grad():
                for name, parameter in self.named_parameters():
                    if not name.startswith("collections.") and "bias" not in name:
                        parameter.normal_(0.0, 0.01)

    def dense_tensors(self) -> dict[str, Tensor]:
        """Weights and buffers of everything but the tables, by their names in the state dict."""
        return {
            name: tensor.detach()
            for name, tensor in chain(self.named_parameters(), self.named_buffers())
            if not name.startswith("collections.")
        }

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """The dense weights that no loss but this task's reaches: of the head, of what reads its sets, and of
        the attention that it owns."""
        sets = self.head.own_sets(task)
        experts = [expert for branch in self.branches.named().values() for expert in branch.experts]
        own: list[nn.Module] = [expert.sequence for expert in experts if expert.set in sets]
        for branch in self.branches.named().values():
            if branch.settings.attention_owner == task:
                own += branch.of_attention
        if self.auxiliary is not None and self.auxiliary.owner == task:
            own.append(self.auxiliary)
        return [*self.head.own_parameters(task), *(weight for each in own for weight in each.parameters())]

    def forward(self, batch: RequestBatch) -> Prediction:
        retrievals, first = self._stage_one(batch)
        late = {}
        if self.late:
            # A collection takes from the bags those of its own features.
            late = self.lookups(
                {
                    name: self.look_up(name, retrievals.candidates if name in self.alone else retrievals.bags)
                    for name in self.late
                }
            )
        pooled = self.pooling(batch, retrievals, first, late)
        output = self.judge(pooled)
        auxiliary = retrieved = None
        if self.auxiliary is not None and self.training:
            main = pooled.of_branch["main"]
            given = self.auxiliary(batch, main.branch, main.behaviors, self.owned.live("main"))
            if self.auxiliary.retrieves:
                retrieved = given
            else:
                auxiliary = given if self.products is None else self.products(HeadOutput(given)).logits
        return Prediction(output.logits, auxiliary, output.base, output.experts, retrieved)

    def judge(self, pooled: Pooled) -> HeadOutput:
        """What the head says of what stage two read."""
        output: HeadOutput
        if torch.is_grad_enabled() and len(self.owned.runs) > 1:
            output = self.owned([self.head(pooled.given[run]) for run in range(len(self.owned.runs))])
        else:
            output = self.head(pooled.given[0])
        return output if self.products is None else self.products(output)

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
        pooled = {name: self.look_up(name, batch.features) for name in self.first}
        pooled |= {name: self.look_up(name, batch.context) for name in self.of_requests}
        vectors = self.lookups(pooled)
        return self.branches(batch, vectors), vectors

    def look_up(self, name: str, bags: KeyedJaggedTensor) -> KeyedTensor:
        """What the collection of a group gives; of a frozen group without a graph, as its rows stay."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.lookups.stays(name)):
            return self.collections[name](bags)


def head_sizes(
    roles: RolesConfig,
    branches: Mapping[str, Branch],
    dimensions: Dimensions,
    tasks: Sequence[Task],
    numbers: int,
) -> HeadSizes:
    """What the head is built from; `roles` are those of the model, `tasks` have towers, `numbers`: X."""
    sets: dict[str, list[int]] = {}
    for branch in branches.values():
        for expert in branch.experts:
            sets.setdefault(expert.set, []).append(expert.sequence.output_width)
    groups = dimensions.groups
    context, prior, prior_context = (
        groups[name].width if name else 0 for name in (roles.context, roles.prior, roles.prior_context)
    )
    return HeadSizes(
        sets,
        numbers + context,
        tasks,
        {each.name: each.owner for each in groups[roles.representation_behavior].sets},
        prior + prior_context,
        dimensions.domains,
    )
