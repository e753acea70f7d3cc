"""The sections groups, tables and plan of the trainer's configuration."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, StringConstraints, model_validator

from embeddings.first_rows import FIRST_SCALES, FirstWeights
from embeddings.optimizers import ROW_OPTIMIZERS, known_optimizer
from embeddings.plan.bandwidths import KNOWN, Bandwidths
from embeddings.plan.request import PlanRules, TableRule
from trainer.config.mistakes import NAME, OWNER
from trainer.config.places import LocalText, PlaceText
from trainer.config.toml import Settings

# FBGEMM's kernels work on four floats at a time.
Dim = Annotated[int, Field(ge=4, le=4096, multiple_of=4)]
# Group names become names of modules, tensors and files.
GroupName = Annotated[str, StringConstraints(pattern=NAME)]

RowOptimizerName = Annotated[
    str, AfterValidator(known_optimizer), Field(json_schema_extra={"enum": [*ROW_OPTIMIZERS]})
]
ShardingName = Literal[
    "data_parallel", "table_wise", "row_wise", "column_wise", "table_row_wise", "grid_shard"
]
_BAGS_ONLY = {
    "table_row_wise": "TorchRec has none for sequences; use row_wise",
    "grid_shard": "TorchRec has none for sequences; use row_wise",
    "data_parallel": "the dense kernel mixes up features of a sequence on CPU; use table_wise or row_wise",
}
_IGNORED_BY_KERNELS = {
    "weight_decay": "the CPU kernels take it and do nothing, so machines would differ; leave it out",
    "momentum": "the CPU kernels of sgd take it and do nothing; use rowwise_adagrad, or leave it out",
}


class SetConfig(Settings):
    """One set of a group: a complete copy of its tables, with rows of its own."""

    owner: str = Field("shared", pattern=OWNER)
    """Who trains the set: `shared` is everybody, `task:NAME` one task, and `domain:ID` one domain of
    data.domain. Owners other than `shared` are for `model.head = "experts"`."""
    dim: Dim | None = None
    """The width of the set's vectors. Not set means that of the group."""


class GroupConfig(Settings):
    """One table group. If the section is left out, there are two groups, `attention` and `representation`."""

    dim: Dim | dict[str, Dim] = 16
    """The width of the vectors: one number for all features, or a table with one number for each feature. On
    a GPU it is 2,048 at most (docs/tables.md)."""
    features: tuple[str, ...] = ()
    """The features that have a table in this group. Empty means all features of the log."""
    fusion: Literal["concat", "sum"] = "concat"
    """How a behavior's vector is made of the vectors of its features: `concat` puts them side by side, `sum`
    adds them up."""
    sets: Annotated[int, Field(ge=1, le=64, strict=True)] | Literal["tasks"] | dict[GroupName, SetConfig] = 1
    """How many complete and independent copies of its tables the group has, for a group that serves the
    representation (Multi-Embedding). They are looked up together, and the heads `mlp` and `experts` read
    them. `tasks` means one shared set, and one for each task, which that task owns (STEM), with
    `model.head = "experts"`. A table names the sets one by one, see
    [groups.<name>.sets.<name>]."""
    vectors: str = ""
    """A name of [data.vectors]: the pre-trained vectors that are the rows of this group's one table, at
    length 1 and of width `dim`. Nothing trains them. Empty means that rows are trained."""
    optimizer: RowOptimizerName = "rowwise_adagrad"
    """The optimizer of the rows, which the backward pass updates (see docs/tables.md)."""
    learning_rate: float = Field(0.05, gt=0)
    """The learning rate of the rows, before any schedule."""
    eps: float = Field(1e-8, gt=0)
    """The number that is added to the root of the optimizer's accumulator."""
    init: Literal["uniform", "normal"] | None = None
    """The distribution of the first weights: `uniform` in [-init_scale, init_scale), or `normal`. If neither
    this key nor `init_scale` is set, groups whose vectors are scored begin with `normal` and 0.25, so that
    equal ids score higher than others before anything is learned, and all others with `uniform` and 0.05
    (docs/training.md). If `init_scale` alone is set, the distribution is `uniform`."""
    init_scale: float | None = Field(None, gt=0)
    """Half the width of `uniform` first weights, and the standard deviation of `normal` ones. Not set means
    0.05 for `uniform` and 0.25 for `normal`."""
    init_like: str = ""
    """Another group, with whose random numbers the tables of this group begin, feature by feature. Where one
    serves candidates and the other behaviors, both have the same vector of an id before anything is learned
    (docs/training.md). Empty means numbers of its own."""
    max_gradient: float = Field(0.0, ge=0)
    """The bound on every element of the gradient of every bag. 0 means no bound."""
    sharding: tuple[ShardingName, ...] = ()
    """The sharding types that the planner may use. Empty means those that suit the device."""
    kind: Literal["bag", "sequence"] = "bag"
    """`bag` takes any number of ids. `sequence` is for features with exactly one id (see docs/tables.md)."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """The type that the rows are kept in."""
    stochastic_rounding: bool | None = None
    """How updated fp16 rows are rounded on a GPU. `true` rounds at random to one of the two nearest numbers,
    so that small updates are not lost; `false` rounds to the nearest, as on a CPU. Not set means `true`."""

    def first_weights(self, scored: bool = False) -> FirstWeights:
        """The distribution of the first weights; `scored`: the group's vectors are."""
        kind = self.init or ("normal" if scored and self.init_scale is None else "uniform")
        return FirstWeights(kind, self.init_scale or FIRST_SCALES[kind])

    def with_first_weights(self, scored: bool) -> GroupConfig:
        """The same with `init` and `init_scale` as if they had been given."""
        first = self.first_weights(scored)
        return self.model_copy(update={"init": first.kind, "init_scale": first.scale})

    @model_validator(mode="before")
    @classmethod
    def _check_kernels(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        for key, reason in _IGNORED_BY_KERNELS.items():
            if key in given:
                raise ValueError(f"{key} is no option of a table: {reason}")
        if given.get("dtype") == "bf16":
            raise ValueError('dtype = "bf16" has no lookup kernel on CPU; use "fp16" or "fp32"')
        return given

    @model_validator(mode="after")
    def _check_together(self) -> GroupConfig:
        if self.vectors and (len(self.features) != 1 or self.sets != 1 or self.dtype != "fp32"):
            raise ValueError(
                "vectors are the rows of one table: name the one feature that has them, without sets, with "
                'dtype = "fp32", in which their products are exact'
            )
        if self.sets == {}:
            raise ValueError("sets names no set: give one or more, or a number")
        if self.kind == "sequence" and self.sets != 1:
            raise ValueError('sets are for kind = "bag": TorchRec looks up no feature twice in sequences')
        if self.kind == "sequence":
            for kind in self.sharding:
                if kind in _BAGS_ONLY:
                    raise ValueError(f'sharding "{kind}" is for kind = "bag": {_BAGS_ONLY[kind]}')
            if isinstance(self.dim, dict) and len(set(self.dim.values())) > 1:
                raise ValueError('kind = "sequence" needs one dim for all features; use kind = "bag"')
        if self.max_gradient and "data_parallel" in self.sharding:
            raise ValueError(
                'max_gradient bounds the gradient of each bag, which "data_parallel" tables do not see; '
                "use another sharding"
            )
        if self.stochastic_rounding is not None and self.dtype != "fp16":
            raise ValueError('stochastic_rounding is for dtype = "fp16": fp32 rows are not rounded')
        if self.stochastic_rounding and "data_parallel" in self.sharding:
            raise ValueError(
                'stochastic_rounding is done by fused kernels, which "data_parallel" tables do not have, so '
                "that they round to nearest; use another sharding"
            )
        return self


def against_init_like(groups: Mapping[str, GroupConfig]) -> Iterator[str]:
    """What is wrong with the groups that `init_like` names."""
    for name, group in groups.items():
        others = sorted(set(groups) - {name})
        if group.init_like and group.init_like not in others:
            there = ", ".join(others) or "there is none"
            yield f"groups.{name}.init_like = {group.init_like!r} is no other group: {there}"
        elif group.init_like and (first := groups[group.init_like].init_like):
            yield (
                f"groups.{name}.init_like = {group.init_like!r}, which itself begins like {first!r}: name a "
                "group with numbers of its own"
            )
        elif group.init_like and groups[group.init_like].vectors:
            yield f"groups.{name}.init_like = {group.init_like!r}, whose rows are pre-trained and not drawn"


def against_vectors(
    groups: Mapping[str, GroupConfig], known: Collection[str], ids: Collection[str] = ()
) -> Iterator[str]:
    """What is wrong with the vectors that groups name.

    Args:
        known: those of [data.vectors]; ids: features whose ids come and go.
    """
    for name, group in groups.items():
        if group.vectors and (moving := [each for each in group.features or () if each in ids]):
            yield (
                f"groups.{name}.vectors: ids.{moving[0]} gives rows to ids as they come, and a file has one "
                f"for each id of the log; leave [ids.{moving[0]}] out"
            )
        if group.vectors and group.vectors not in known:
            there = ", ".join(known) or "none"
            yield f"groups.{name}.vectors = {group.vectors!r}: [data.vectors] has {there}"


class TableConfig(Settings):
    """One feature's tables."""

    rows: PositiveInt | None = None
    """The number of rows of each table of this feature. Not set means as many as the log's manifest has
    ids."""


class PlanTableConfig(Settings):
    """One table's own rule. The table is named as the plan prints it, `<group>__<feature>`, or
    `<group>/<set>/<feature>` in quotes where the group has several sets.

    What is not set is as for the table's group.
    """

    sharding: tuple[ShardingName, ...] = ()
    """The sharding types that the planner may use."""
    kernels: tuple[Literal["fused", "fused_uvm", "fused_uvm_caching"], ...] = ()
    """The compute kernels that the planner may use."""
    cache_load_factor: float | None = Field(None, gt=0, le=1)
    """The share of the rows that the GPU keeps a copy of, for the kernel `fused_uvm_caching`. Not set means
    0.2. The tables of one group share a cache of the average size."""
    cache_algorithm: Literal["lru", "lfu"] | None = None
    """Which rows these are: the last used (`lru`) or the most used (`lfu`). Not set means `lru`."""

    @model_validator(mode="after")
    def _check_cache(self) -> PlanTableConfig:
        for key in ("cache_load_factor", "cache_algorithm"):
            if getattr(self, key) is not None and self.kernels and "fused_uvm_caching" not in self.kernels:
                raise ValueError(f'{key} is for kernel "fused_uvm_caching", which kernels does not name')
        return self


class PlanConfig(Settings):
    """Where the planner may put tables, and what it counts with."""

    file: PlaceText = ""
    """Training reuses this plan, which `tandemrec plan --json` wrote. Empty means that a plan is made at the
    start."""
    allow_unified_memory: bool = False
    """Whether the planner may put rows in host memory behind the device's memory where nothing else fits.
    Otherwise that is an error."""
    reserve: float = Field(0.15, ge=0, lt=1)
    """The share of each rank's memory that tables leave free for activations and buffers."""
    # A new key here must default to None. Otherwise the plans of older checkpoints are not kept.
    even_within: float | None = Field(None, ge=0, allow_inf_nan=False)
    """How much slower than the fastest a plan may be by the planner's estimate, as a share of its time, to be
    taken because its fullest rank holds less. 0 means that only plans count that are as fast. Not set means
    0.1."""
    mapped_folder: LocalText | None = None
    """A folder on a fast local disk. The tables of CPU ranks lie in nameless files there, memory-mapped,
    instead of in memory, so that they may be larger than it. The planner then counts with what is free on
    that disk. Not set means memory."""
    gpu: Literal["A100", "H100", "H200", "B200"] | None = None
    """The GPU whose bandwidths the planner counts with. Not set means the GPU that trains; for `tandemrec
    plan` it means TorchRec's defaults, which are those of older GPUs."""
    hbm_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Another bandwidth of a GPU's memory, in 10**9 bytes a second."""
    host_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Another bandwidth between a GPU's memory and the host's, one way, in 10**9 bytes a second."""
    intra_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Another bandwidth from a GPU to the other GPUs of its node, in 10**9 bytes a second."""
    inter_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Another bandwidth from a GPU to those of other nodes, in 10**9 bytes a second."""
    tables: dict[str, PlanTableConfig] = Field(default_factory=dict)
    """For the name of a table, its own rule, see [plan.tables.<name>]."""

    def rules(self) -> PlanRules:
        """These rules as the planner takes them."""
        tables = {name: TableRule(**table.model_dump()) for name, table in self.tables.items()}
        within = {} if self.even_within is None else {"even_within": self.even_within}
        return PlanRules(self.allow_unified_memory, self.reserve, tables, **within)

    def bandwidths(self, device: Bandwidths) -> Bandwidths:
        """The bandwidths that the planner counts with; `device` holds what the GPU says of itself."""
        given = Bandwidths(self.hbm_gb_per_s, self.host_gb_per_s, self.intra_gb_per_s, self.inter_gb_per_s)
        return given.over(device if self.gpu is None else KNOWN[self.gpu])

    @model_validator(mode="after")
    def _check_unified_memory(self) -> PlanConfig:
        for name, table in self.tables.items():
            for key in ("cache_load_factor", "cache_algorithm"):
                if getattr(table, key) is not None and not self.allow_unified_memory:
                    raise ValueError(
                        f"plan.tables.{name}.{key} is for tables in host memory: set "
                        "plan.allow_unified_memory = true as well"
                    )
        return self
