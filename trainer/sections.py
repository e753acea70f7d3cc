"""The sections of the trainer's configuration; `trainer.config` puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from embeddings.planning import PlanRules, TableRule
from trainer.settings import Settings

# FBGEMM's kernels work on four floats at a time.
Dim = Annotated[int, Field(ge=4, le=4096, multiple_of=4)]
# Group names become names of modules, tensors and files.
GroupName = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_]*$")]

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


class SearchConfig(Settings):
    """Hard search in the data path (SIM's hard search, and its hierarchical generalisation).

    Attributes:
        levels: taxonomy features, coarse to fine, that a candidate is matched on; empty = no hard search.
            One level is SIM's hard search. The item itself may be the finest level.
        budget: behaviors kept for each candidate, deepest match first, then most recent.
        half_life_days: of the decayed match counts.
        counts: give the model the number of matches at each level, total and decayed.
        domain: a feature of behaviors; domain_minimum: its value -> how many of its behaviors are guaranteed
            a place.
    """

    levels: tuple[str, ...] = ()
    budget: PositiveInt = 200
    half_life_days: float = Field(30.0, gt=0)
    counts: bool = True
    domain: str = ""
    domain_minimum: dict[int, PositiveInt] = Field(default_factory=dict)

    @property
    def count_names(self) -> list[str]:
        """The numbers that the search adds to each candidate."""
        if not self.counts:
            return []
        kinds = ("matches", "recent_matches")
        return [f"{kind}_{level}" for kind in kinds for level in self.levels]


class DataConfig(Settings):
    """What is read and how it is cut into steps.

    Attributes:
        log: folder of the sequence log.
        history_length: L, the behaviors a request may see (with `search`: that the search looks through).
        requests_per_block: consecutive requests of one user that share one block (one lookup).
        behaviors_per_block: a block is closed early when its history would grow beyond this; 0 = 2 L.
        batch_candidates: candidates of one step over all ranks, met to within one block.
        batch_behaviors: a step is closed before its behaviors exceed this; 0 = no limit. Histories differ
            a thousandfold, so this is what bounds a step's memory.
        order: `shuffled` by train.seed, or `stored` (streaming, in the order the log was written).
        shuffle_row_groups: blocks are shuffled within this many row groups.
        sharding: how a step's blocks are dealt to ranks. `steps`: by cost, each step evenly; every rank
            decodes every row group. `row_groups`: each rank decodes its own row groups only, and a step is
            even on average. Steps and positions are the same either way.
        ingestion_delay: seconds before a request during which behaviors are not yet visible.
        verify: compare every file with the manifest's SHA-256 before the first step (ranks share the work).
        on_bad: what a damaged or malformed row group does: `fail`, or `skip` it, counted and reported.
        max_bad: largest share of row groups that may be skipped.
        workers: threads that decode row groups ahead; prefetch: batches collated ahead by another thread.
        search: hard search while reading, see [data.search].
        clusters: deliver the log's clusters of behaviors, and single behaviors only as far as `recent`.
        recent: the newest behaviors of each request that are delivered besides what a hard search or clusters
            leave of its history.
    """

    log: Path = Path("log")
    history_length: int = Field(500, ge=1, le=1_000_000)
    requests_per_block: PositiveInt = 8
    behaviors_per_block: int = Field(0, ge=0)
    batch_candidates: PositiveInt = 2048
    batch_behaviors: int = Field(0, ge=0)
    order: Literal["shuffled", "stored"] = "shuffled"
    sharding: Literal["steps", "row_groups"] = "steps"
    shuffle_row_groups: PositiveInt = 64
    ingestion_delay: int = Field(0, ge=0)
    verify: bool = True
    on_bad: Literal["fail", "skip"] = "fail"
    max_bad: float = Field(0.001, ge=0, le=1)
    workers: int = Field(1, ge=0, le=1024)
    prefetch: int = Field(4, ge=0, le=1024)
    search: SearchConfig = SearchConfig()
    clusters: bool = False
    recent: int = Field(0, ge=0)

    @property
    def block_limit(self) -> int:
        return self.behaviors_per_block or 2 * self.history_length


class GroupConfig(Settings):
    """One table group; left out, there are two, `attention` and `representation`.

    Attributes:
        dim: vector width, one for all features or one a feature.
        features: features that have a table here; empty means all of the log.
        fusion: a behavior's vector is its features' vectors side by side, `concat`, or their `sum`.
        optimizer: the fused one of the rows; learning_rate: its step size before any schedule; eps: added to
            the root of its accumulator.
        init: first weights are `uniform` in [-init_scale, init_scale), or `normal`.
        init_scale: half the width of `uniform` first weights, the standard deviation of `normal` ones.
        max_gradient: bound on every element of the gradient of every bag; 0 = none.
        sharding: sharding types the planner may use; empty means what suits the device.
        kind: `bag`, or `sequence` for features with exactly one id (see docs/tables.md).
        dtype: what the rows are kept in.
    """

    dim: Dim | dict[str, Dim] = 16
    features: tuple[str, ...] = ()
    fusion: Literal["concat", "sum"] = "concat"
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = "rowwise_adagrad"
    learning_rate: float = Field(0.05, gt=0)
    eps: float = Field(1e-8, gt=0)
    init: Literal["uniform", "normal"] = "uniform"
    init_scale: float = Field(0.05, gt=0)
    max_gradient: float = Field(0.0, ge=0)
    sharding: tuple[ShardingName, ...] = ()
    kind: Literal["bag", "sequence"] = "bag"
    dtype: Literal["fp32", "fp16"] = "fp32"

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
        return self


class TableConfig(Settings):
    """One feature's tables.

    Attributes:
        rows: of each of them; not set: as many as the log's manifest has ids.
    """

    rows: PositiveInt | None = None


Decay = Literal["none", "linear", "cosine"]


class TableRatesConfig(Settings):
    """How the tables' learning rates differ in time from the dense ones; a key that is not set is no
    difference. See [train].

    Attributes:
        warmup, warmup_steps, decay: as in [train], of the tables alone.
    """

    warmup: float | None = Field(None, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    decay: Decay | None = None


class EarlyStoppingConfig(Settings):
    """End training where validation no longer gets better, and keep the best checkpoint.

    Attributes:
        metric: of the validation split and the log's first task, see `evaluate`.
        patience: validations in a row that may bring nothing; 0 = never stop early.
        min_delta: a gain must be larger than this to count.
    """

    metric: Literal["auc", "gauc", "logloss"] = "auc"
    patience: int = Field(0, ge=0)
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)

    @property
    def on(self) -> bool:
        return self.patience > 0


class TrainConfig(Settings):
    """The training run; docs/training.md explains it.

    Attributes:
        seed: of every random draw: initial weights and the order of the data.
        epochs: passes over the train split.
        max_steps: stop after this many steps; 0 = no limit. Schedules run to whichever end comes first.
        optimizer: of the dense weights; learning_rate: theirs, before any schedule.
        weight_decay: of adamw, on dense weights of two dimensions or more.
        max_gradient_norm: dense gradients are scaled down to this global norm; 0 = never. Tables are not
            clipped and their gradients are not in the norm.
        warmup: share of the run in which all learning rates rise linearly; warmup_steps: the same in steps,
            which then counts instead, but for no more than a fifth of the run.
        decay: `linear` or `cosine` lets all learning rates fall to a thousandth at the last step.
        tables: another warm-up or decay for the tables' rates, which are groups.<name>.learning_rate.
        precision: of everything dense in training: `bf16` multiplies in bfloat16; weights, looked-up vectors
            and the loss stay fp32. Evaluation is always fp32.
        pipeline: TorchRec's train pipeline: `none`, `sparse_dist` (copies later batches and exchanges their
            ids meanwhile), `prefetch` (fills the tables' caches meanwhile too; CUDA only; without such
            caches as `sparse_dist`). `auto`: `sparse_dist` on CUDA, `none` on a CPU, which has nothing to
            overlap. Losses are the same.
        log_every: steps between two lines of metrics.jsonl.
        validate_every: steps between two validations; 0 = only at the end.
        early_stopping: see [train.early_stopping]; it needs validate_every.
        init_from: a run, or tables written by `unshard`, whose weights a new run starts with; see
            `trainer.warm_start`.
        init_optimizer: `carry` the accumulators of the tables' rows with them, or start those `fresh`.
        timeout_s: seconds that ranks wait for each other in one collective before they give up.
        max_starts_without_progress: a run is refused after so many starts from the same step; 0 = no limit.
    """

    seed: int = Field(17, ge=0, lt=2**31)
    epochs: PositiveInt = 1
    max_steps: int = Field(0, ge=0)
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_gradient_norm: float = Field(0.0, ge=0, allow_inf_nan=False)
    warmup: float = Field(0.0, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    decay: Decay = "linear"
    tables: TableRatesConfig = TableRatesConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    pipeline: Literal["auto", "none", "sparse_dist", "prefetch"] = "auto"
    log_every: PositiveInt = 10
    validate_every: int = Field(0, ge=0)
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    init_from: str = ""
    init_optimizer: Literal["carry", "fresh"] = "carry"
    timeout_s: float = Field(600, gt=0)
    max_starts_without_progress: int = Field(5, ge=0)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> TrainConfig:
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f'train.weight_decay = {self.weight_decay} is for adamw: set train.optimizer = "adamw"'
            )
        if self.optimizer == "adamw" and not self.weight_decay:
            raise ValueError('train.optimizer = "adamw" without train.weight_decay is adam: say which')
        if self.early_stopping.on and not self.validate_every:
            raise ValueError(
                f"train.early_stopping.patience = {self.early_stopping.patience} counts validations: set "
                "train.validate_every to the steps between two of them"
            )
        return self


class CommsConfig(Settings):
    """What table vectors and their gradients are rounded to between ranks.

    Attributes:
        forward: the vectors; backward: the gradients.
    """

    forward: Literal["fp32", "fp16", "bf16"] = "fp32"
    backward: Literal["fp32", "fp16", "bf16"] = "fp32"


class CheckpointConfig(Settings):
    """When to save besides the end of training and a stop signal, and how. See docs/checkpoints.md.

    Attributes:
        every_steps: steps between two saves; 0 = not by steps.
        every_minutes: minutes between two saves, by rank 0's clock; 0 = not by time.
        check_every: steps between two moments at which the ranks agree whether a stop was asked for, the
            minutes are over, or a save in the background failed. One rank alone looks after every step.
        keep: newest checkpoints to keep.
        mode: `async` copies the tensors and writes while training goes on, `sync` writes first.
        on_error: what a save that fails during training does: `stop`, or `continue` and try again when the
            next one is due. The save at the end always stops.
        timeout_minutes: longest time that ranks wait for each other while saving.
    """

    every_steps: int = Field(1000, ge=0)
    every_minutes: float = Field(0.0, ge=0)
    check_every: PositiveInt = 10
    keep: PositiveInt = 2
    mode: Literal["async", "sync"] = "async"
    on_error: Literal["stop", "continue"] = "stop"
    timeout_minutes: float = Field(60.0, gt=0)


class PlanTableConfig(Settings):
    """One table's own rule, by the name the plan prints (`<group>__<feature>`); empty = as its group.

    Attributes:
        sharding: sharding types the planner may use; kernels: compute kernels.
    """

    sharding: tuple[ShardingName, ...] = ()
    kernels: tuple[Literal["fused", "fused_uvm", "fused_uvm_caching"], ...] = ()


class PlanConfig(Settings):
    """Where tables may lie.

    Attributes:
        file: reuse this plan, written by `tandemrec plan --json`, to train; empty = plan at the start.
        allow_unified_memory: let the planner put rows in host memory behind the device's where nothing else
            fits; else that is an error.
        reserve: share of each rank's memory that tables leave free, for activations and buffers.
        tables: table name -> its own rule.
    """

    file: str = ""
    allow_unified_memory: bool = False
    reserve: float = Field(0.15, ge=0, lt=1)
    tables: dict[str, PlanTableConfig] = Field(default_factory=dict)

    def rules(self) -> PlanRules:
        """The same for the planner."""
        tables = {name: TableRule(table.sharding, table.kernels) for name, table in self.tables.items()}
        return PlanRules(self.allow_unified_memory, self.reserve, tables)
