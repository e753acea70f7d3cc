"""The two-stage model: roles -> search -> sequence model -> head.

TWIN and DARE are the same code: four roles, each served by a named table group. With one group for all
roles this is TWIN as DARE's authors ran it; with one group for attention and one for representation, DARE.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.groups import TableGroup
from embeddings.jagged import select_bags, select_keys, vectors_in_order
from trainer.config import ModelConfig
from trainer.data.batch import RequestBatch
from trainer.model.head import Head
from trainer.model.search import Kept, dot_search, windows_of
from trainer.model.sequence import TargetAttention, kept_scores, sigmoid_weights, softmax_weights
from trainer.model.time import TimeBias

WEIGHTS = {"softmax": softmax_weights, "sigmoid": sigmoid_weights}


class TwoStageModel(nn.Module):
    """Scores the candidates of a RequestBatch.

    Args:
        config: the model section.
        history_length: L, sizes the time tables.
        groups: the resolved table groups.
        collections: group name -> module that maps a KJT of stride B to a KeyedTensor of [B, width];
            an EmbeddingBagCollection in training, plain tables when scoring.
        tasks: T.
        numbers: X, numeric features of a candidate; they reach the head as sign(x) log(1 + |x|).
    """

    def __init__(
        self,
        config: ModelConfig,
        history_length: int,
        groups: Mapping[str, TableGroup],
        collections: Mapping[str, nn.Module],
        tasks: int,
        numbers: int = 0,
    ) -> None:
        super().__init__()
        self.config, self.roles = config, config.roles
        self.history_length, self.numbers = history_length, numbers
        self.features = {name: group.features for name, group in groups.items()}
        self.collections = nn.ModuleDict(collections)
        self.time_bias = TimeBias(history_length, config.position, config.age)
        self.sequence = TargetAttention(
            groups[self.roles.representation_target].width,
            history_length,
            target_aware=config.target_aware,
            position=config.position,
            age=config.age,
        )
        beside = numbers + (groups[self.roles.context].width if self.roles.context else 0)
        self.head = Head(self.sequence.output_width + beside, config.hidden, tasks)
        self.weights = WEIGHTS[config.weights]

    def forward(self, batch: RequestBatch) -> Tensor:
        """-> logits, float32 [C, T]."""
        roles, behaviors = self.roles, batch.behaviors
        vectors = {name: self._lookup(name, batch.features) for name in self._first_lookups()}
        query_CD = vectors[roles.attention_target][behaviors:]
        key_ND = vectors[roles.attention_behavior][:behaviors]
        windows = windows_of(batch, self.history_length)
        kept = dot_search(query_CD, key_ND, self.time_bias, windows, self.config.k)
        score_CK = (
            kept_scores(query_CD, key_ND, kept.index) if behaviors else query_CD.new_zeros(kept.index.shape)
        )
        weight_CK = self.weights(score_CK + self.time_bias(kept.rank, kept.bucket), kept.mask)
        target_CD, behavior_SD, index_CK = self._representation(batch, kept, vectors)
        parts = self.sequence(target_CD, behavior_SD, index_CK, weight_CK, kept.rank, kept.bucket)
        logits: Tensor = self.head([*parts, *self._beside(batch)])
        return logits

    def _beside(self, batch: RequestBatch) -> list[Tensor]:
        """What the head is given besides the sequence: numbers of the candidate, context of its request."""
        parts = []
        if self.numbers:
            parts.append(batch.numeric.sign() * batch.numeric.abs().log1p())
        if self.roles.context:
            assert batch.context is not None
            parts.append(self._lookup(self.roles.context, batch.context)[batch.candidate_request])
        return parts

    def _first_lookups(self) -> list[str]:
        """Groups looked up for all behaviors and candidates, before the search."""
        roles = self.roles
        names = [roles.attention_target, roles.attention_behavior]
        if self.config.lookup == "full":
            names += [roles.representation_target, roles.representation_behavior]
        return list(dict.fromkeys(names))

    def _lookup(self, group: str, bags: KeyedJaggedTensor) -> Tensor:
        """-> [stride of the bags, width of the group]."""
        features = self.features[group]
        return vectors_in_order(self.collections[group](select_keys(bags, features)), features)

    def _representation(
        self, batch: RequestBatch, kept: Kept, vectors: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> target [C, D], behaviors [S, D], and the kept behaviors' index [C, K] into those S.

        Groups not looked up yet are looked up here, for the union of the kept behaviors and the candidates.
        """
        roles, behaviors = self.roles, batch.behaviors
        late = [n for n in (roles.representation_target, roles.representation_behavior) if n not in vectors]
        target = vectors.get(roles.representation_target)
        behavior = vectors.get(roles.representation_behavior)
        index_CK = kept.index
        if late:
            chosen_S, place_N = union_of(kept, behaviors)
            bags = torch.cat([chosen_S, behaviors + torch.arange(batch.candidates, device=chosen_S.device)])
            selected = select_bags(batch.features, bags)
            found = {name: self._lookup(name, selected) for name in dict.fromkeys(late)}
            if target is None:
                target_CD = found[roles.representation_target][chosen_S.numel() :]
            if behavior is None:
                behavior, index_CK = found[roles.representation_behavior], place_N[kept.index]
        if target is not None:
            target_CD = target[behaviors:]
        assert behavior is not None
        return target_CD, behavior, index_CK


def union_of(kept: Kept, behaviors: int) -> tuple[Tensor, Tensor]:
    """-> the behaviors that any candidate kept, ascending [S], and each behavior's place among them [N].

    Places of behaviors that nobody kept are 0; N is at least 1, so that padding has something to point at.
    """
    touched = torch.zeros(max(behaviors, 1), dtype=torch.bool, device=kept.index.device)
    touched[kept.index[kept.mask]] = True
    place = torch.where(touched, torch.cumsum(touched, 0) - 1, 0)
    return torch.nonzero(touched[:behaviors]).squeeze(1), place
