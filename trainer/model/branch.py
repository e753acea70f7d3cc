"""One branch of a model: stage one, which keeps behaviors, and the experts that read them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.batch import RequestBatch
from trainer.model.ops.bags import rows_at
from trainer.model.read.sequence import Behaviors, SequenceModel
from trainer.model.retrieve.score import WEIGHTS, AttentionVectors, Scorer, build_scorer
from trainer.model.retrieve.search import Query, Retrieval, Search
from trainer.model.settings import BranchConfig
from trainer.model.sizes import BranchSizes, Dimensions
from trainer.model.windows import Selection, Windows, all_ids, first_ids


@dataclass(frozen=True)
class Expert:
    """A sequence model and the set of the representation that it reads.

    Attributes:
        sequence: the model; target, behavior: groups of the candidates' and the behaviors' vectors.
        set: its name, empty where the groups have one set only; width: of its vectors.
    """

    sequence: SequenceModel
    target: str
    behavior: str
    set: str
    width: int


class Reading(NamedTuple):
    """What stage two of a branch read.

    Attributes:
        branch: that read; behaviors: with the vectors of all sets.
        weight_CHK: their attention weights, None without a scorer.
    """

    branch: Branch
    behaviors: Behaviors
    weight_CHK: Tensor | None

    def parts(self, stopped: bool = False) -> dict[str, list[Tensor]]:
        """Set -> parts, each [C, *]; `stopped`: no gradient of theirs reaches the weights."""
        weight_CHK = self.weight_CHK
        if stopped and weight_CHK is not None:
            weight_CHK = weight_CHK.detach()
        return self.branch.read(self.behaviors, weight_CHK)


class Branch(nn.Module):
    """Stage one and its experts, built from settings; see `trainer.model.settings.BranchConfig`.

    Every set of the representation has an expert; all of them read what the one stage one keeps. The modules
    of both stages lie side by side here, under the names that they have in every checkpoint.

    Attributes:
        sequence: the model of the one set; with named sets there are `sequences.<SET>` instead.
        attention_width: of the attended columns of the attention vectors.
        widths: set -> D, in the order in which vectors lie side by side; owners: set -> who trains it;
            shared_sets: those that no task and no domain owns.
        scorer, search: None where the sequence model works on windows; cross: None without cross features
            in scores; cross_values: whether values have some.
        times: tables that roles share, where `time = "concat"`.
        columns: the attended columns of the attention vectors; None = all.
        experts: stage two, who reads what stage one keeps.
    """

    def __init__(self, settings: BranchConfig, dimensions: Dimensions) -> None:
        super().__init__()
        roles = settings.roles
        sets = dimensions.groups[roles.representation_behavior].sets
        of_sets = {each.name: BranchSizes(settings, settings.newest, dimensions, each.name) for each in sets}
        sizes = of_sets[sets[0].name]
        self.settings, self.columns, self.attention_width = settings, sizes.columns, sizes.width
        # Checkpoints and first weights depend on this order.
        models = {name: settings.sequence_kind.build(settings, of_set) for name, of_set in of_sets.items()}
        if "" in models:
            self.sequence = models[""]
        else:
            self.sequences = nn.ModuleDict(models)
        self.widths = {name: of_set.representation.width for name, of_set in of_sets.items()}
        self.owners = {each.name: each.owner for each in sets}
        self.shared_sets = [name for name, owner in self.owners.items() if owner == "shared"]
        self.scorer: Scorer | None = None
        self.search: Search | None = None
        if settings.searches:
            self.scorer = build_scorer(settings, sizes)
            self.search = settings.search_kind.build(settings, sizes)
        self._score_times = [t for n, t in sizes.time_vectors.items() if n not in sizes.time_owners("values")]
        if sizes.time_vectors:
            self.times = nn.ModuleDict(sizes.time_vectors)
        scored = settings.roles.cross if "scores" in settings.cross_in else ""
        self.cross = CrossBias(dimensions.groups[scored].widths()) if scored else None
        self.cross_values = sizes.cross_values > 0
        groups = roles.representation_target, roles.representation_behavior
        self.experts = [Expert(models[name], *groups, name, width) for name, width in self.widths.items()]

    @property
    def of_attention(self) -> list[nn.Module]:
        """What makes scores, of both stages, and nothing else."""
        made = [each for each in (self.scorer, self.search, self.cross) if each is not None]
        return [*made, *self._score_times]

    @property
    def shared_widths(self) -> tuple[int, int]:
        """D of the shared sets together, and the width of all that their experts make."""
        shared = [expert for expert in self.experts if expert.set in self.shared_sets]
        return sum(each.width for each in shared), sum(each.sequence.output_width for each in shared)

    def retrieve(
        self,
        batch: RequestBatch,
        vectors: Mapping[str, Tensor],
        windows: Windows,
        known: Mapping[str, Tensor] | None = None,
    ) -> Retrieval:
        """Which K behaviors each candidate keeps.

        Args:
            vectors: [N + C, width] of the groups that serve the attention roles; [C, width] where all that
                `of_behaviors` gives is `known`.
        """
        raw = self._attention_vectors(batch, vectors, known)
        if self.scorer is None or self.search is None:
            everything = Selection(windows.index, windows.mask, windows.marks, windows.log_size)
            return Retrieval(windows, raw, raw, everything, whole=False)
        encoded = self.scorer.encode(raw)
        feature = self.settings.ids_feature
        ids_N, ids_C = all_ids(batch, feature) if feature else (None, None)
        selection = self.search(Query(self.scorer, encoded, raw, windows, ids_C, ids_N))
        return Retrieval(windows, raw, encoded, selection, self.search.keeps_all)

    def weigh(self, retrieval: Retrieval) -> Tensor | None:
        """Attention weights of the kept behaviors, [C, H, K]; None without a scorer."""
        if self.scorer is None:
            return None
        if retrieval.whole:
            score_CHK = self.scorer.over_windows(retrieval.vectors, retrieval.windows)
        else:
            score_CHK = self.scorer.of_kept(retrieval.vectors, retrieval.selection)
        return WEIGHTS[self.settings.weights](score_CHK, retrieval.selection.mask[:, None])

    def read(
        self, behaviors: Behaviors, weight_CHK: Tensor | None, sets: Collection[str] | None = None
    ) -> dict[str, list[Tensor]]:
        """Stage two: set -> parts, each [C, *].

        Args:
            behaviors: with the vectors of the sets side by side; sets: their names, None = all.
        """
        experts = [expert for expert in self.experts if sets is None or expert.set in sets]
        if len(experts) == 1:
            (expert,) = experts
            return {expert.set: expert.sequence(behaviors, weight_CHK)}
        models, widths = zip(*((expert.sequence, expert.width) for expert in experts), strict=True)
        parts = models[0].read_sets(models, widths, behaviors, weight_CHK)
        return {expert.set: own for expert, own in zip(experts, parts, strict=True)}

    def shared(self, behaviors: Behaviors) -> Behaviors:
        """The same with the vectors of the shared sets alone."""
        if len(self.shared_sets) == len(self.widths):
            return behaviors
        of_sets = dict(zip(self.widths, behaviors.by_set(list(self.widths.values())), strict=True))
        kept = [of_sets[name] for name in self.shared_sets]
        return replace(
            behaviors,
            target_CD=torch.cat([each.target_CD for each in kept], dim=1),
            value_SD=torch.cat([each.value_SD for each in kept], dim=1),
        )

    def of_behaviors(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All that follows from behaviors whatever the candidates and requests, by name: [N, *] each.

        Args:
            vectors: [N, width] of the groups that `behavior_groups` names.
        """
        found, roles = {}, self.settings.roles
        if self.settings.attend != ():
            key_ND = found["raw"] = self._attended(vectors[roles.attention_behavior])
            makers = [self.scorer, self.search] if self.search is not None else [self.experts[0].sequence]
            for maker in makers:
                assert isinstance(maker, Scorer | Search | SequenceModel)
                found |= maker.of_behaviors(key_ND)
        if self.cross is not None:
            found["cross"] = self.cross(vectors[roles.cross])
        if self.cross_values:
            found["beside"] = vectors[roles.cross]
        return found

    @property
    def behavior_groups(self) -> list[str]:
        """Groups that behaviors are looked up in for stage one."""
        roles = self.settings.roles
        attended = [roles.attention_behavior] if self.settings.attend != () else []
        return attended + ([roles.cross] if roles.cross else [])

    def _attention_vectors(
        self, batch: RequestBatch, vectors: Mapping[str, Tensor], known: Mapping[str, Tensor] | None
    ) -> AttentionVectors:
        n, roles = 0 if known is not None else batch.behaviors, self.settings.roles
        if self.settings.attend != ():
            query_CD = self._attended(vectors[roles.attention_target][n:])
            if known is None:
                key_ND = self._attended(at_least_one_row(vectors[roles.attention_behavior][:n]))
            else:
                key_ND = known["raw"]
        else:
            # Time alone is scored.
            query_CD = batch.labels.new_zeros(batch.candidates, 0)
            key_ND = batch.labels.new_zeros(max(batch.behaviors, 1), 0)
        group_C = torch.zeros_like(batch.candidate_request)
        if self.settings.time_group:
            group_C = first_ids(batch, self.settings.time_group)[1]
        cross_N = beside_ND = None
        if known is not None:
            cross_N, beside_ND = known.get("cross"), known.get("beside")
        elif roles.cross:
            cross_ND = at_least_one_row(vectors[roles.cross][:n])
            cross_N = None if self.cross is None else self.cross(cross_ND)
            beside_ND = cross_ND if self.cross_values else None
        return AttentionVectors(query_CD, key_ND, group_C, cross_N, known, beside_ND)

    def _attended(self, vector_ND: Tensor) -> Tensor:
        """The attended columns."""
        if not self.columns:
            return vector_ND
        return torch.cat([vector_ND[:, columns] for columns in self.columns], dim=1)


class CrossBias(nn.Module):
    """One scalar a behavior from its cross features: sum_j beta_j <w_j, e_j> (TWIN, section 4.2)."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.widths = widths
        self.compress = nn.Parameter(torch.cat([torch.randn(width) * width**-0.5 for width in widths]))
        self.beta = nn.Parameter(torch.ones(len(widths)))

    def forward(self, vector_ND: Tensor) -> Tensor:
        """[N, sum of widths] -> [N]."""
        # Filled on the device: a list of the host's would be copied, for which it waits.
        of_feature_D = torch.cat(
            [torch.full((width,), j, device=self.beta.device) for j, width in enumerate(self.widths)]
        )
        beta_D = rows_at(self.beta, of_feature_D)
        # Not a matrix product, which rounds equal rows differently depending on their place.
        return (vector_ND * (self.compress * beta_D)).sum(1)


def at_least_one_row(vector_ND: Tensor) -> Tensor:
    """A zero row where there is none, so that padding has something to point at."""
    return vector_ND if vector_ND.shape[0] else F.pad(vector_ND, (0, 0, 0, 1))


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
