"""The two-stage model: roles -> search -> sequence model -> head.

TWIN and DARE are the same code: four roles, each served by a named table group. With one group for all
roles this is TWIN as DARE's authors ran it; with one group for attention and one for representation, DARE.
Other models are other branches (`trainer.model.branch`) of the same frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.jagged import select_bags, select_keys, vectors_in_order
from trainer.data.batch import RequestBatch
from trainer.model.auxiliary import WholeWindow
from trainer.model.branch import Branch, Searched, Surroundings, at_least_one_row
from trainer.model.head import DotHead, Head
from trainer.model.settings import ModelConfig
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
        self.config, self.numbers, self.history_length = config, numbers, around.history_length
        groups = around.groups
        self.groups = dict(groups)
        self.collections = nn.ModuleDict(collections)
        branches = config.all_branches()
        self.branches = nn.ModuleDict({name: Branch(branch, around) for name, branch in branches.items()})
        width = sum(branch.sequence.output_width for branch in self._branches().values())
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
        searched, vectors = self._stage_one(batch)
        rows = self._representation(batch, searched, vectors)
        parts = []
        for name, branch in self._branches().items():
            found, roles = searched[name], branch.roles
            behavior = rows[roles.representation_behavior]
            place = found.index if behavior.place_N is None else behavior.place_N[found.index]
            target_CD = rows[roles.representation_target].target_CD
            parts += branch.pool(found, target_CD, behavior.value_SD, place)
        logits: Tensor = self.head([*parts, *self._beside(batch)])
        return Prediction(logits, self._auxiliary_logits(searched["main"], rows))

    @torch.no_grad()
    def search(self, batch: RequestBatch) -> dict[str, Kept]:
        """Stage one alone: what each branch keeps of the batch."""
        return {name: found.kept for name, found in self.searched(batch).items()}

    @torch.no_grad()
    def searched(self, batch: RequestBatch) -> dict[str, Searched]:
        """The same, with the windows that each branch searched and the vectors it scored."""
        return self._stage_one(batch)[0]

    def _branches(self) -> dict[str, Branch]:
        return {name: branch for name, branch in self.branches.items() if isinstance(branch, Branch)}

    def _stage_one(self, batch: RequestBatch) -> tuple[dict[str, Searched], dict[str, Tensor]]:
        """What each branch found, and the vectors that were looked up for it."""
        vectors = {name: self._lookup(name, batch.features) for name in self._first_lookups()}
        windows: dict[Source, Windows] = {}
        found = {}
        for name, branch in self._branches().items():
            if branch.source not in windows:
                windows[branch.source] = windows_of(batch, self.history_length, branch.source)
            found[name] = branch.find(batch, vectors, windows[branch.source])
        return found, vectors

    def _auxiliary_logits(self, searched: Searched, rows: Mapping[str, Rows]) -> Tensor | None:
        if self.auxiliary is None or not self.training:
            return None
        main = self._branches()["main"]
        target_CD = rows[main.roles.representation_target].target_CD
        value_ND = rows[main.roles.representation_behavior].value_SD
        logits: Tensor = self.auxiliary(main, searched, target_CD, value_ND)
        return logits

    def _beside(self, batch: RequestBatch) -> list[Tensor]:
        """What the head is given besides the sequence: numbers of the candidate, context of its request."""
        parts = []
        if self.numbers:
            parts.append(batch.numeric.sign() * batch.numeric.abs().log1p())
        if self.config.roles.context:
            assert batch.context is not None
            parts.append(self._lookup(self.config.roles.context, batch.context)[batch.candidate_request])
        return parts

    def _first_lookups(self) -> list[str]:
        """Groups looked up for all behaviors and candidates, before the search."""
        names = []
        for branch in self._branches().values():
            roles = branch.roles
            names += [roles.attention_target, roles.attention_behavior] if branch.attends else []
            names += [roles.cross] if roles.cross else []
            if self.config.lookup == "full":
                names += [roles.representation_target, roles.representation_behavior]
        return list(dict.fromkeys(names))

    def _lookup(self, group: str, bags: KeyedJaggedTensor) -> Tensor:
        """-> [stride of the bags, width of the group]."""
        features = self.groups[group].features
        vectors = vectors_in_order(self.collections[group](select_keys(bags, features)), features)
        return self.groups[group].fuse(vectors)

    def _representation(
        self, batch: RequestBatch, searched: Mapping[str, Searched], vectors: Mapping[str, Tensor]
    ) -> dict[str, Rows]:
        """Rows of every group of a representation role.

        Groups not looked up yet are looked up here, for the union of the kept behaviors and the candidates.
        """
        n, wanted = batch.behaviors, []
        for branch in self._branches().values():
            wanted += [branch.roles.representation_target, branch.roles.representation_behavior]
        rows = {
            name: Rows(vectors[name][n:], at_least_one_row(vectors[name][:n]), None)
            for name in wanted
            if name in vectors
        }
        late = [name for name in dict.fromkeys(wanted) if name not in vectors]
        if late:
            kept = [found.windows if found.whole else found.kept for found in searched.values()]
            chosen_S, place_N = union_of(kept, n)
            bags = torch.cat([chosen_S, n + torch.arange(batch.candidates, device=chosen_S.device)])
            selected = select_bags(batch.features, bags)
            for name in late:
                found, s = self._lookup(name, selected), chosen_S.numel()
                rows[name] = Rows(found[s:], at_least_one_row(found[:s]), place_N)
        return rows


def union_of(kept: Sequence[Kept | Windows], behaviors: int) -> tuple[Tensor, Tensor]:
    """-> the behaviors that anything kept, ascending [S], and each behavior's place among them [N].

    Places of behaviors that nobody kept are 0; N is at least 1, so that padding has something to point at.
    """
    touched = torch.zeros(max(behaviors, 1), dtype=torch.bool, device=kept[0].index.device)
    for each in kept:
        touched[each.index[each.mask]] = True
    place = torch.where(touched, torch.cumsum(touched, 0) - 1, 0)
    return torch.nonzero(touched[:behaviors]).squeeze(1), place


def _normal_init(model: TwoStageModel) -> None:
    """N(0, 0.01) for everything dense without "bias" in its name, scales and slopes too (DARE's code)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("collections.") and "bias" not in name:
                parameter.normal_(0.0, 0.01)
