"""The sections of the trainer's configuration but those of tables; `run_config` puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainer.config.toml import Settings


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
            even on average. `auto`: `steps` on a CPU; on GPUs `row_groups` where shuffled blocks spread well
            over the ranks, see docs/cluster.md. Steps and positions are the same either way.
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
    sharding: Literal["auto", "steps", "row_groups"] = "auto"
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
        objective: what is trained, by its name in `trainer.objectives.table`: `bce`, binary cross entropy.
        optimizer: of the dense weights; learning_rate: theirs, before any schedule.
        weight_decay: of adamw, on dense weights of two dimensions or more.
        max_gradient_norm: dense gradients are scaled down to this global norm; 0 = never. Tables are not
            clipped and their gradients are not in the norm.
        warmup: share of the run in which all learning rates rise linearly; warmup_steps: the same in steps,
            which then counts instead, but for no more than a fifth of the run.
        decay: `linear` or `cosine` lets all learning rates fall to a thousandth at the last step.
        tables: another warm-up or decay for the tables' rates, which are groups.<name>.learning_rate.
        device: where ranks compute, and `evaluate` and `export` of this run, too. `auto`: on a GPU each where
            there are some that the installed builds can use, else on the CPU, and says why; `cuda`, `cpu`:
            there and nowhere else.
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
            `trainer.checkpoint.warm_start`.
        init_optimizer: `carry` the accumulators of the tables' rows with them, or start those `fresh`.
        timeout_s: seconds that ranks wait for each other in one collective before they give up.
        max_starts_without_progress: a run is refused after so many starts from the same step; 0 = no limit.
    """

    seed: int = Field(17, ge=0, lt=2**31)
    epochs: PositiveInt = 1
    max_steps: int = Field(0, ge=0)
    objective: str = "bce"
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_gradient_norm: float = Field(0.0, ge=0, allow_inf_nan=False)
    warmup: float = Field(0.0, ge=0, lt=1)
    warmup_steps: int | None = Field(None, ge=0)
    decay: Decay = "linear"
    tables: TableRatesConfig = TableRatesConfig()
    device: Literal["auto", "cpu", "cuda"] = "auto"
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
