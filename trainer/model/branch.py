"""One branch of a model: a search, attention weights and a sequence model over what the search kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.groups import TableGroup
from trainer.config.model import BranchConfig
from trainer.data.batch import RequestBatch
from trainer.model.ops.bags import rows_at
from trainer.model.read.collision import HashCollision
from trainer.model.read.sasrec import TargetDecoupledSasrec
from trainer.model.read.sequence import Behaviors, SequenceModel, StackedTin, TargetAttention
from trainer.model.retrieve.score import (
    WEIGHTS,
    Attended,
    DotScorer,
    FeatureProjection,
    MlpScorer,
    Scorer,
    twin_projections,
)
from trainer.model.retrieve.search import (
    AllSearch,
    DotSearch,
    HammingSearch,
    HardSearch,
    Query,
    Search,
    SoftSearch,
)
from trainer.model.time import AGE_BUCKETS, TimeBias, TimeEncoding
from trainer.model.windows import Kept, Source, Windows, all_ids, first_ids


@dataclass(frozen=True)
class Surroundings:
    """What a branch must know besides its settings.

    Attributes:
        groups: the resolved table groups; history_length: L; levels: of the hard search while reading.
        seed: of fixed random projections.
    """

    groups: Mapping[str, TableGroup]
    history_length: int
    levels: int
    seed: int


@dataclass(frozen=True)
class Searched:
    """Stage one's result for a branch; `vectors` are encoded by the scorer, `raw` are not.

    `whole`: every candidate keeps its whole window, in the order of its columns.
    """

    windows: Windows
    raw: Attended
    vectors: Attended
    kept: Kept
    whole: bool = False

    @property
    def index(self) -> Tensor:
        """Behaviors whose representation stage two wants, each once a window or once a candidate."""
        return self.windows.index if self.whole else self.kept.index


class Branch(nn.Module):
    """Built from its settings alone; see `trainer.config.model.BranchConfig`."""

    def __init__(self, settings: BranchConfig, around: Surroundings) -> None:
        super().__init__()
        self.settings, self.roles = settings, settings.roles
        made = _Parts(settings, around)
        self.columns = made.columns
        self.sequence: SequenceModel = made.sequence()
        alone = self.sequence.on_windows
        self.scorer: Scorer | None = None if alone else made.scorer()
        self.search: Search | None = None if alone else made.search()
        self.cross = CrossBias(made.widths(self.roles.cross)) if self.roles.cross else None
        self.weights = WEIGHTS[settings.weights]

    @property
    def attends(self) -> bool:
        """Whether any feature is scored, not only time."""
        return self.settings.attend != ()

    @property
    def source(self) -> Source:
        """The windows that this branch looks at."""
        return Source(self.settings.newest, self.settings.clusters)

    def find(self, batch: RequestBatch, vectors: Mapping[str, Tensor], windows: Windows) -> Searched:
        """Stage one. `vectors` are [N + C, width] of the groups that serve its attention roles."""
        raw = self._raw(batch, vectors)
        if self.scorer is None or self.search is None:
            kept = Kept(windows.index, windows.mask, windows.marks, windows.log_size)
            return Searched(windows, raw, raw, kept)
        encoded = self.scorer.encode(raw)
        ids_N, ids_C = all_ids(batch, self.settings.match) if self.settings.match else (None, None)
        kept = self.search(Query(self.scorer, encoded, raw, windows, ids_C, ids_N))
        return Searched(windows, raw, encoded, kept, isinstance(self.search, AllSearch))

    def weigh(self, searched: Searched) -> Tensor | None:
        """Attention weights of the kept behaviors, [C, H, K]."""
        if self.scorer is None:
            return None
        if searched.whole:
            score_CHK = self.scorer.over_windows(searched.vectors, searched.windows)
        else:
            score_CHK = self.scorer.of_kept(searched.vectors, searched.kept)
        return self.weights(score_CHK, searched.kept.mask[:, None])

    def pool(self, searched: Searched, target_CD: Tensor, value_SD: Tensor, place: Tensor) -> list[Tensor]:
        """Stage two; `place` (shape of `searched.index`) points into the looked-up rows."""
        behaviors = Behaviors(
            target_CD, value_SD, place, searched.kept, searched.windows, searched.raw, searched.whole
        )
        parts: list[Tensor] = self.sequence(behaviors, self.weigh(searched))
        return parts

    def _raw(self, batch: RequestBatch, vectors: Mapping[str, Tensor]) -> Attended:
        n, roles = batch.behaviors, self.roles
        if self.attends:
            query_CD = vectors[roles.attention_target][n:]
            key_ND = at_least_one_row(vectors[roles.attention_behavior][:n])
        else:
            device = batch.request_time.device
            query_CD = torch.zeros(batch.candidates, 0, device=device)
            key_ND = torch.zeros(max(n, 1), 0, device=device)
        if self.columns is not None:
            query_CD, key_ND = _select(query_CD, self.columns), _select(key_ND, self.columns)
        group_C = torch.zeros_like(batch.candidate_request)
        if self.settings.time_group:
            group_C = first_ids(batch, self.settings.time_group)[1]
        cross_N = self.cross(at_least_one_row(vectors[roles.cross][:n])) if self.cross is not None else None
        return Attended(query_CD, key_ND, group_C, cross_N)


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


class _Parts:
    """Turns settings into modules: one small decision a method."""

    def __init__(self, settings: BranchConfig, around: Surroundings) -> None:
        self.settings, self.around, roles = settings, around, settings.roles
        attention, self.group = around.groups[roles.attention_behavior], settings.time_group
        self.attended, self.columns = _chosen(attention, settings.attend)
        self.width = sum(self.attended)
        self.representation = around.groups[roles.representation_behavior]

    def widths(self, group: str) -> tuple[int, ...]:
        return self.around.groups[group].widths()

    def longest(self) -> int:
        """Most behaviors of a window."""
        return self.settings.newest or self.around.history_length

    def rows(self, stage: str) -> dict[str, int]:
        """Sizes of the mark tables that a stage uses."""
        settings = self.settings
        if stage not in settings.time_in:
            return {}
        sizes = {"position": self.longest() + 1, "age": AGE_BUCKETS, "level": self.around.levels + 1}
        return {name: size for name, size in sizes.items() if getattr(settings, name)}

    def groups(self) -> int:
        """G: rows of the feature that groups the targets."""
        if not self.group:
            return 1
        tables = [t for group in self.around.groups.values() for t in group.tables]
        return max(t.rows for t in tables if t.feature == self.group)

    def scorer(self) -> Scorer:
        settings, rows = self.settings, self.rows("scores")
        bias = encoding = None
        if rows and settings.time == "encoding":
            encoding = TimeEncoding(rows, self.width, settings.time_target, self.groups())
        elif rows:
            bias = TimeBias(rows, settings.time_target, self.groups(), settings.time_dim)
        if settings.score == "mlp":
            return MlpScorer(self.width, settings.score_hidden, bias)
        query, key = self.projections(self.attended)
        return DotScorer(query, key, settings.heads, bias, encoding)

    def projections(self, widths: tuple[int, ...]) -> tuple[nn.Module | None, nn.Module | None]:
        """Of query and key."""
        if self.settings.projection == "feature":
            return FeatureProjection(widths), FeatureProjection(widths)
        if self.settings.projection == "heads":
            return twin_projections(sum(widths), self.settings.heads * self.settings.head_dim)
        return None, None

    def search(self) -> Search:
        settings = self.settings
        made: dict[str, Callable[[], Search]] = {
            "dot": lambda: DotSearch(settings.k),
            "all": lambda: AllSearch(settings.k),
            "recent": lambda: AllSearch(settings.k),
            "hard": lambda: HardSearch(settings.k),
            "simhash": lambda: HammingSearch(settings.k, self.width, settings.hash_bits, self.around.seed),
            "soft": lambda: SoftSearch(settings.k, self.width, settings.head_dim),
        }
        return made[settings.search]()

    def sequence(self) -> SequenceModel:
        settings, width = self.settings, self.representation.width
        made: dict[str, Callable[[], SequenceModel]] = {
            "attention": self.target_attention,
            "stacked": lambda: StackedTin(width, self.encoding(), settings.layers),
            "collision": lambda: HashCollision(
                width,
                self.width,
                settings.hashes,
                settings.hash_bits,
                self.around.seed,
                target_aware=settings.target_aware,
            ),
            "sasrec": lambda: TargetDecoupledSasrec(
                width,
                self.longest(),
                self.groups(),
                settings.layers,
                settings.heads,
            ),
        }
        return made[settings.sequence]()

    def encoding(self) -> TimeEncoding:
        return TimeEncoding(
            self.rows("values"), self.representation.width, self.settings.time_target, self.groups()
        )

    def target_attention(self) -> TargetAttention:
        target = value = None
        if self.settings.projection == "feature":
            target, value = (FeatureProjection(self.representation.widths()) for _ in range(2))
        return TargetAttention(
            self.representation.width,
            self.encoding(),
            target_aware=self.settings.target_aware,
            heads=self.settings.heads,
            target=target,
            value=value,
        )


def at_least_one_row(vector_ND: Tensor) -> Tensor:
    """A zero row where there is none, so that padding has something to point at."""
    return vector_ND if vector_ND.shape[0] else F.pad(vector_ND, (0, 0, 0, 1))


def _chosen(group: TableGroup, attend: tuple[str, ...] | None) -> tuple[tuple[int, ...], list[slice] | None]:
    """Widths and columns of the attended features in a group's vector; None = all columns."""
    if attend is None:
        return group.widths(), None
    begin, columns = 0, {}
    for table in group.tables:
        columns[table.feature] = slice(begin, begin + table.dim)
        begin += table.dim
    chosen = [columns[feature] for feature in attend]
    return tuple(part.stop - part.start for part in chosen), chosen


def _select(vector_ND: Tensor, columns: list[slice]) -> Tensor:
    """The named columns, in their order."""
    return torch.cat([vector_ND[:, part] for part in columns], dim=1) if columns else vector_ND[:, :0]
