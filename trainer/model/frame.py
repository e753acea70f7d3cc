"""The two-stage model: roles -> search -> sequence model -> head.

TWIN and DARE are the same code: four roles, each served by a named table group. With one group for all
roles this is TWIN as DARE's authors ran it; with one group for attention and one for representation, DARE.
Other models are other branches (`trainer.model.branch`) of the same frame.

TorchRec's train pipelines trace the forward pass of every module that holds a sharded one, to start the
exchange of a later batch's ids early. So `TwoStageModel.forward` is a thin shell, which calls collections and
modules without collections and looks into no tensor; all else happens inside those modules, which the trace
does not enter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.lookup.jagged import select_bags
from trainer.config.model import ModelConfig
from trainer.data.batch import RequestBatch
from trainer.model.border import Lookups
from trainer.model.branch import Branch, Searched, Surroundings, at_least_one_row
from trainer.model.heads.auxiliary import WholeWindow
from trainer.model.heads.mlp import DotHead, Head
from trainer.model.union import most_kept, padded_union, union_of
from trainer.model.windows import Kept, Source, Windows, windows_of


class Prediction(NamedTuple):
    """What the model says of C candidates and T tasks.

    Attributes:
        logits: float32 [C, T].
        auxiliary: logits [C, T] of the auxiliary head while training, else None.
    """

    logits: Tensor
    auxiliary: Tensor | None


class Rows(NamedTuple):
    """Representation of one group: target [C, D], behaviors [S, D], S at least 1, and the row of each of the
    batch's behaviors [N] (None = behavior n is row n)."""

    target_CD: Tensor
    value_SD: Tensor
    place_N: Tensor | None


class Found(NamedTuple):
    """Stage one's result.

    Attributes:
        branches: that made it; searched: what each found.
        selected: KJT of the behaviors that any branch kept and maybe others, then the candidates; None where
            all of them were looked up already. place_N: where each of the batch's behaviors is among the
            former; None: behavior n is at n.
    """

    branches: Branches
    searched: dict[str, Searched]
    selected: KeyedJaggedTensor | None
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
        return {name: branch for name, branch in self.items() if isinstance(branch, Branch)}

    def forward(self, batch: RequestBatch, vectors: Mapping[str, Tensor]) -> Found:
        """`vectors`: [N + C, width] of the groups that are looked up first."""
        windows: dict[Source, Windows] = {}
        searched = {}
        for name, branch in self.named().items():
            if branch.source not in windows:
                windows[branch.source] = windows_of(batch, self.history_length, branch.source)
            searched[name] = branch.find(batch, vectors, windows[branch.source])
        if not self.selects:
            return Found(self, searched, None, None)
        kept = [found.windows if found.whole else found.kept for found in searched.values()]
        if self.pads_on(batch.behavior_time.device):
            most = most_kept(batch.host_sizes, (self._keeps(name, found) for name, found in searched.items()))
            chosen = padded_union(kept, batch.behaviors, most)
        else:
            chosen = union_of(kept, batch.behaviors)
        if chosen.behavior_S is None:
            return Found(self, searched, batch.features, None)
        candidates = batch.behaviors + torch.arange(batch.candidates, device=chosen.behavior_S.device)
        bags = torch.cat([chosen.behavior_S, candidates])
        selected = select_bags(batch.features, bags, batch.host_sizes.one_id)
        return Found(self, searched, selected, chosen.place_N)

    def pads_on(self, device: torch.device) -> bool:
        """Whether more behaviors than were kept are looked up again, so that the host need not wait."""
        return device.type != "cpu" if self.pads is None else self.pads

    def _keeps(self, name: str, found: Searched) -> tuple[int, int | None]:
        """What a branch keeps at most, for `most_kept`."""
        branch = self.named()[name]
        whole = found.whole or branch.search is None
        return branch.source.newest, None if whole else found.kept.index.shape[1]


class Pooled(NamedTuple):
    """Stage two's result.

    Attributes:
        parts: what the head is given, each [C, width].
        main, searched: the main branch and what it found; target_CD, value_ND: its representation.
    """

    parts: list[Tensor]
    main: Branch
    searched: Searched
    target_CD: Tensor
    value_ND: Tensor


class Pooling(nn.Module):
    """Stage two of all branches, and what the head is given besides.

    Args:
        context: the group of context features, empty without them; numbers: whether candidates have any.
    """

    def __init__(self, context: str, numbers: bool) -> None:
        super().__init__()
        self.context, self.numbers = context, numbers

    def forward(
        self, batch: RequestBatch, found: Found, first: Mapping[str, Tensor], late: Mapping[str, Tensor]
    ) -> Pooled:
        """`first`: of all behaviors and candidates, and of the context; `late`: of `found.selected`."""
        branches, parts, rows = found.branches.named(), [], _representation(batch, found, first, late)
        for name, branch in branches.items():
            searched, roles = found.searched[name], branch.roles
            behavior = rows[roles.representation_behavior]
            place = searched.index if behavior.place_N is None else behavior.place_N[searched.index]
            target_CD = rows[roles.representation_target].target_CD
            parts += branch.pool(searched, target_CD, behavior.value_SD, place)
        if self.numbers:
            parts.append(batch.numeric.sign() * batch.numeric.abs().log1p())
        if self.context:
            parts.append(first[self.context][batch.candidate_request])
        roles = branches["main"].roles
        target_CD = rows[roles.representation_target].target_CD
        value_ND = rows[roles.representation_behavior].value_SD
        return Pooled(parts, branches["main"], found.searched["main"], target_CD, value_ND)


def _representation(
    batch: RequestBatch, found: Found, first: Mapping[str, Tensor], late: Mapping[str, Tensor]
) -> dict[str, Rows]:
    """Rows of every group of a representation role."""
    rows = {}
    for branch in found.branches.named().values():
        for name in (branch.roles.representation_target, branch.roles.representation_behavior):
            vectors, place = (late[name], found.place_N) if name in late else (first[name], None)
            behaviors = vectors.shape[0] - batch.candidates
            rows[name] = Rows(vectors[behaviors:], at_least_one_row(vectors[:behaviors]), place)
    return rows


class TwoStageModel(nn.Module):
    """Scores the candidates of a RequestBatch.

    Args:
        config: the model section.
        around: groups, L, levels of the hard search, seed.
        collections: group name -> module that maps a KJT of stride B to a KeyedTensor of [B, width];
            an EmbeddingBagCollection in training, plain tables when scoring.
        tasks: T.
        numbers: X, numeric features of a candidate; they reach the head as sign(x) log(1 + |x|).
    """

    def __init__(
        self,
        config: ModelConfig,
        around: Surroundings,
        collections: Mapping[str, nn.Module],
        tasks: int,
        numbers: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.numbers, groups = config, numbers, around.groups
        self.collections = nn.ModuleDict(collections)
        self.lookups = Lookups(groups)
        branches = {name: Branch(branch, around) for name, branch in config.all_branches().items()}
        self.first, self.late = first_and_late(config.lookup == "full", branches.values())
        self.branches = Branches(branches, around.history_length, selects=bool(self.late))
        self.pooling = Pooling(config.roles.context, numbers > 0)
        width = sum(branch.sequence.output_width for branch in branches.values())
        beside = numbers + (groups[config.roles.context].width if config.roles.context else 0)
        self.head: nn.Module
        if config.head == "dot":
            self.head = DotHead(width // 2, beside, tasks)
        else:
            self.head = Head(width + beside, config.hidden, tasks, config.norm)
        self.auxiliary = WholeWindow(config, groups, tasks) if config.auxiliary != "none" else None
        if config.dense_init == "normal":
            _normal_init(self)

    def forward(self, batch: RequestBatch) -> Prediction:
        found, first = self._stage_one(batch)
        late = self._lookup(self.late, found.selected) if self.late else {}
        pooled = self.pooling(batch, found, first, late)
        logits = self.head(pooled.parts)
        auxiliary = None
        if self.auxiliary is not None and self.training:
            auxiliary = self.auxiliary(pooled.main, pooled.searched, pooled.target_CD, pooled.value_ND)
        return Prediction(logits, auxiliary)

    @torch.no_grad()
    def search(self, batch: RequestBatch) -> dict[str, Kept]:
        """Stage one alone: what each branch keeps of the batch."""
        return {name: found.kept for name, found in self.searched(batch).items()}

    @torch.no_grad()
    def searched(self, batch: RequestBatch) -> dict[str, Searched]:
        """The same, with the windows that each branch searched and the vectors it scored."""
        return self._stage_one(batch)[0].searched

    def _stage_one(self, batch: RequestBatch) -> tuple[Found, dict[str, Tensor]]:
        """What each branch found, and the vectors that were looked up for it."""
        # All are started before any is waited for.
        pooled = {name: self.collections[name](batch.features) for name in self.first}
        if self.config.roles.context:
            pooled[self.config.roles.context] = self.collections[self.config.roles.context](batch.context)
        vectors = self.lookups(pooled)
        return self.branches(batch, vectors), vectors

    def _lookup(self, groups: Iterable[str], bags: KeyedJaggedTensor) -> dict[str, Tensor]:
        """-> group name -> [stride of the bags, width of the group]."""
        # A collection takes from the bags those of its own features.
        vectors: dict[str, Tensor] = self.lookups({name: self.collections[name](bags) for name in groups})
        return vectors


def first_and_late(full: bool, branches: Iterable[Branch]) -> tuple[list[str], list[str]]:
    """Groups looked up for all behaviors and candidates before the search, and those looked up after it.

    `full`: groups of the representation are of the first kind too.
    """
    first, late = [], []
    for branch in branches:
        roles = branch.roles
        first += [roles.attention_target, roles.attention_behavior] if branch.attends else []
        first += [roles.cross] if roles.cross else []
        late += [roles.representation_target, roles.representation_behavior]
    first = list(dict.fromkeys(first + late if full else first))
    return first, [name for name in dict.fromkeys(late) if name not in first]


def _normal_init(model: TwoStageModel) -> None:
    """N(0, 0.01) for everything dense without "bias" in its name, scales and slopes too (DARE's code)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("collections.") and "bias" not in name:
                parameter.normal_(0.0, 0.01)
