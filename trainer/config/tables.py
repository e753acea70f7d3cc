"""The sections of the trainer's configuration that say what tables there are and where they may lie."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, StringConstraints, model_validator

from embeddings.optimizers import ROW_OPTIMIZERS, known_optimizer
from embeddings.plan.bandwidths import KNOWN, Bandwidths
from embeddings.plan.request import PlanRules, TableRule
from trainer.config.toml import Settings

# FBGEMM's kernels work on four floats at a time.
Dim = Annotated[int, Field(ge=4, le=4096, multiple_of=4)]
# Group names become names of modules, tensors and files.
GroupName = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]*$")]

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


class GroupConfig(Settings):
    """One table group; left out, there are two, `attention` and `representation`.

    Attributes:
        dim: vector width, one for all features or one a feature; on a GPU 2,048 at most (docs/tables.md).
        features: features that have a table here; empty means all of the log.
        fusion: a behavior's vector is its features' vectors side by side, `concat`, or their `sum`.
        optimizer: of the rows, which the backward pass updates (see docs/tables.md); learning_rate: its step
            size before any schedule; eps: added to the root of its accumulator.
        init: first weights are `uniform` in [-init_scale, init_scale), or `normal`.
        init_scale: half the width of `uniform` first weights, the standard deviation of `normal` ones.
        max_gradient: bound on every element of the gradient of every bag; 0 = none.
        sharding: sharding types the planner may use; empty means what suits the device.
        kind: `bag`, or `sequence` for features with exactly one id (see docs/tables.md).
        dtype: what the rows are kept in.
        stochastic_rounding: of updated fp16 rows, on a GPU: at random to one of the two nearest numbers, so
            that small updates are not lost, or (false) to the nearest, as on a CPU. Not set: at random.
    """

    dim: Dim | dict[str, Dim] = 16
    features: tuple[str, ...] = ()
    fusion: Literal["concat", "sum"] = "concat"
    optimizer: RowOptimizerName = "rowwise_adagrad"
    learning_rate: float = Field(0.05, gt=0)
    eps: float = Field(1e-8, gt=0)
    init: Literal["uniform", "normal"] = "uniform"
    init_scale: float = Field(0.05, gt=0)
    max_gradient: float = Field(0.0, ge=0)
    sharding: tuple[ShardingName, ...] = ()
    kind: Literal["bag", "sequence"] = "bag"
    dtype: Literal["fp32", "fp16"] = "fp32"
    stochastic_rounding: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_option_that_kernels_ignore(cls, given: object) -> object:
        if not isinstance(given, dict):
            return given
        for key, reason in _IGNORED_BY_KERNELS.items():
            if key in given:
                raise ValueError(f"{key} is no option of a table: {reason}")
        if given.get("dtype") == "bf16":
            raise ValueError('dtype = "bf16" has no lookup kernel on CPU; use "fp16" or "fp32"')
        return given

    @model_validator(mode="after")
    def _combinations(self) -> GroupConfig:
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


class TableConfig(Settings):
    """One feature's tables.

    Attributes:
        rows: of each of them; not set: as many as the log's manifest has ids.
    """

    rows: PositiveInt | None = None


class PlanTableConfig(Settings):
    """One table's own rule, by the name the plan prints (`<group>__<feature>`); empty = as its group.

    Attributes:
        sharding: sharding types the planner may use; kernels: compute kernels.
        cache_load_factor: of kernel `fused_uvm_caching`: share of the rows that the GPU keeps a copy of; not
            set: 0.2. Tables of one group share a cache, of the average size.
        cache_algorithm: which rows these are: the last used (`lru`) or the most used (`lfu`); not set: `lru`.
    """

    sharding: tuple[ShardingName, ...] = ()
    kernels: tuple[Literal["fused", "fused_uvm", "fused_uvm_caching"], ...] = ()
    cache_load_factor: float | None = Field(None, gt=0, le=1)
    cache_algorithm: Literal["lru", "lfu"] | None = None

    @model_validator(mode="after")
    def _cache_without_a_cache(self) -> PlanTableConfig:
        for key in ("cache_load_factor", "cache_algorithm"):
            if getattr(self, key) is not None and self.kernels and "fused_uvm_caching" not in self.kernels:
                raise ValueError(f'{key} is for kernel "fused_uvm_caching", which kernels does not name')
        return self


class PlanConfig(Settings):
    """Where tables may lie.

    Attributes:
        file: reuse this plan, written by `tandemrec plan --json`, to train; empty = plan at the start.
        allow_unified_memory: let the planner put rows in host memory behind the device's where nothing else
            fits; else that is an error.
        reserve: share of each rank's memory that tables leave free, for activations and buffers.
        gpu: whose bandwidths the planner counts with; not set: the GPU that trains; for `tandemrec plan`,
            TorchRec's defaults, which are those of older GPUs.
        hbm_gb_per_s: another bandwidth of a GPU's memory, in 10**9 bytes a second.
        host_gb_per_s: the same between a GPU's memory and the host's, one way.
        intra_gb_per_s: the same from a GPU to the others of its node; inter_gb_per_s: to other nodes.
        tables: table name -> its own rule.
    """

    file: str = ""
    allow_unified_memory: bool = False
    reserve: float = Field(0.15, ge=0, lt=1)
    # New settings here must be None where they are not set, or the plans of older checkpoints are not kept.
    gpu: Literal["A100", "H100", "H200", "B200"] | None = None
    hbm_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    host_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    intra_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    inter_gb_per_s: float | None = Field(None, gt=0, allow_inf_nan=False)
    tables: dict[str, PlanTableConfig] = Field(default_factory=dict)

    def rules(self) -> PlanRules:
        """The same for the planner."""
        tables = {
            name: TableRule(table.sharding, table.kernels, table.cache_load_factor, table.cache_algorithm)
            for name, table in self.tables.items()
        }
        return PlanRules(self.allow_unified_memory, self.reserve, tables)

    def bandwidths(self, device: Bandwidths) -> Bandwidths:
        """What the planner counts with; `device`: what the GPU says of itself."""
        given = Bandwidths(self.hbm_gb_per_s, self.host_gb_per_s, self.intra_gb_per_s, self.inter_gb_per_s)
        return given.over(device if self.gpu is None else KNOWN[self.gpu])

    @model_validator(mode="after")
    def _caches_need_unified_memory(self) -> PlanConfig:
        for name, table in self.tables.items():
            for key in ("cache_load_factor", "cache_algorithm"):
                if getattr(table, key) is not None and not self.allow_unified_memory:
                    raise ValueError(
                        f"plan.tables.{name}.{key} is for tables in host memory: set "
                        "plan.allow_unified_memory = true as well"
                    )
        return self
