"""The sections data, train, comms and checkpoint of the trainer's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from trainer.config.places import PlaceSetting, PlaceText
from trainer.config.similarity import (
    SimilarityConfig,
    SimilarityName,
    VectorsConfig,
    VectorsName,
    problems_of_similarity,
)
from trainer.config.toml import Settings


class SearchConfig(Settings):
    """Hard search in the data path (SIM's hard search, and its hierarchical generalisation)."""

    levels: tuple[str, ...] = ()
    """The taxonomy features that a candidate is matched on, coarse to fine. Empty means no hard search. One
    level is SIM's hard search. The item itself may be the finest level."""
    budget: PositiveInt = 200
    """The number of behaviors kept for each candidate: those of the deepest match first, then the most
    recent."""
    half_life_days: float = Field(30.0, gt=0)
    """The half-life, in days, of the decayed match counts."""
    counts: bool = True
    """Whether the model gets the number of matches at each level, both in total and decayed."""
    domain: str = ""
    """A feature of behaviors, such as their domain, some values of which `domain_minimum` guarantees a place.
    Empty means none."""
    domain_minimum: dict[int, PositiveInt] = Field(default_factory=dict)
    """For a value of `domain`, the number of its behaviors that are guaranteed a place."""

    @property
    def count_names(self) -> list[str]:
        """The numbers that the search adds to each candidate."""
        if not self.counts:
            return []
        kinds = ("matches", "recent_matches")
        return [f"{kind}_{level}" for kind in kinds for level in self.levels]


class DataConfig(Settings):
    """What is read and how it is cut into steps."""

    log: PlaceSetting = Path("log")
    """The folder of the sequence log, here or in an object store, see docs/object_storage.md."""
    history_length: int = Field(500, ge=1, le=1_000_000)
    """L, the number of behaviors that a request may see. With `search` it is the number that the search looks
    through."""
    requests_per_block: PositiveInt = 8
    """The number of consecutive requests of one user that share one block, and so one lookup."""
    behaviors_per_block: int = Field(0, ge=0)
    """A block is closed early when its history would grow beyond this number of behaviors. 0 means 2 L."""
    batch_candidates: PositiveInt = 2048
    """The number of candidates in one step over all ranks. A step meets it to within one block."""
    batch_behaviors: int = Field(0, ge=0)
    """A step is closed before its behaviors exceed this number. 0 means no limit. Histories differ a
    thousandfold in length, so this is what bounds a step's memory."""
    order: Literal["shuffled", "stored"] = "shuffled"
    """The order of the blocks. `shuffled` draws it from train.seed. `stored` keeps the order in which the log
    was written, for streaming."""
    sharding: Literal["auto", "steps", "row_groups"] = "auto"
    """How the blocks of a step are dealt to ranks. `steps` deals each step evenly by cost, and every rank
    decodes every row group. `row_groups` has some ranks decode each row group, as few as keep steps about
    even, and half of the ranks at most. `auto` means `steps` on a CPU; on GPUs it means `row_groups` where
    half of the ranks are enough, see docs/cluster.md. The steps and the positions in the log are the same
    either way."""
    shuffle_row_groups: PositiveInt = 64
    """Blocks are shuffled within this number of row groups."""
    domain: str = ""
    """The feature, of candidates or of requests and with exactly one id, that says which domain a candidate
    is from. Empty means that there is one domain only."""
    ingestion_delay: int = Field(0, ge=0)
    """The number of seconds before a request in which behaviors are not yet visible to it."""
    verify: Literal["auto"] | bool = "auto"
    """Whether every file is compared with the manifest's SHA-256 before the first step. The ranks share the
    work. `auto` does so for a log in a folder. Of a log in an object store it compares the sizes only, since
    all of it would have to be fetched once more; damage to a page is found when the page is read, by its
    checksum."""
    on_bad: Literal["fail", "skip"] = "fail"
    """What happens at a damaged or malformed row group. `fail` ends the run; `skip` leaves the row group out,
    counts it and reports it."""
    max_bad: float = Field(0.001, ge=0, le=1)
    """The largest share of row groups that may be skipped."""
    workers: int = Field(1, ge=0, le=1024)
    """The number of threads that decode row groups ahead."""
    prefetch: int = Field(4, ge=0, le=1024)
    """The number of batches that another thread collates ahead."""
    search: SearchConfig = SearchConfig()
    """Hard search while reading, see [data.search]."""
    clusters: bool = False
    """Whether the log's clusters of behaviors are delivered. Single behaviors are then delivered only as far
    as `recent` asks."""
    recent: int = Field(0, ge=0)
    """The number of newest behaviors of each request that are delivered besides what a hard search or
    clusters leave of its history."""
    vectors: dict[VectorsName, VectorsConfig] = Field(default_factory=dict)
    """Pre-trained vectors, see [data.vectors.<name>]."""
    similarity: dict[SimilarityName, SimilarityConfig] = Field(default_factory=dict)
    """Features that say how near the vectors of a candidate are to others, see [data.similarity.<name>]."""

    @model_validator(mode="after")
    def _check_similarities(self) -> DataConfig:
        for problem in problems_of_similarity(self.vectors, self.similarity):
            raise ValueError(problem)
        return self

    @property
    def block_limit(self) -> int:
        return self.behaviors_per_block or 2 * self.history_length

    def absolute(self) -> DataConfig:
        """The same, with places that other folders can be entered from."""
        vectors = {
            name: each.model_copy(update={"file": each.file.absolute()})
            for name, each in self.vectors.items()
        }
        return self.model_copy(update={"log": self.log.absolute(), "vectors": vectors})


Decay = Literal["none", "linear", "cosine"]


class TableRatesConfig(Settings):
    """How the schedule of the tables' learning rates differs from that of the dense weights.

    A key that is not set makes no difference.
    """

    warmup: float | None = Field(None, ge=0, lt=1)
    """As train.warmup, for the tables alone."""
    warmup_steps: int | None = Field(None, ge=0)
    """As train.warmup_steps, for the tables alone."""
    decay: Decay | None = None
    """As train.decay, for the tables alone."""


class EarlyStoppingConfig(Settings):
    """When training ends because validation no longer gets better; the best checkpoint is kept."""

    metric: Literal["auc", "gauc", "logloss"] = "auc"
    """The metric that is watched, on the validation split, see docs/evaluation.md."""
    task: str = ""
    """The task whose metric is watched. Empty means the first one. `*` means the mean over all tasks that
    have the metric."""
    patience: int = Field(0, ge=0)
    """The number of validations in a row that may bring no gain. 0 means that training never stops early."""
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)
    """A gain counts only if it is larger than this."""

    @property
    def on(self) -> bool:
        return self.patience > 0


class TrainConfig(Settings):
    """The training run; docs/training.md explains it."""

    seed: int = Field(17, ge=0, lt=2**31)
    """The seed of every random draw: of the initial weights and of the order of the data."""
    epochs: PositiveInt = 1
    """The number of passes over the train split."""
    max_steps: int = Field(0, ge=0)
    """Training stops after this number of steps. 0 means no limit. Schedules run to whichever end comes
    first, this one or that of the last epoch."""
    objective: str = "bce"
    """The loss of each candidate, for tasks that name none."""
    mean: Literal["step", "domain"] = "step"
    """How the losses of a task's candidates become one: `step` is their mean over all observed candidates of
    a step, `domain` is the sum over domains of the means of each domain (Crocodile), see data.domain. A
    ranking loss follows where its `pairs` is `domain`, too."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """The optimizer of the dense weights."""
    learning_rate: float = Field(1e-3, gt=0)
    """The learning rate of the dense weights, before any schedule."""
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    """The weight decay of `adamw`. It applies to dense weights of two dimensions or more."""
    max_gradient_norm: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Dense gradients are scaled down to this global norm. 0 means never. Tables are not clipped, and their
    gradients are not in the norm."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """The share of the run in which all learning rates rise linearly."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps. If it is set, it counts instead of `warmup`, but for no more than a
    fifth of the run."""
    decay: Decay = "linear"
    """`linear` and `cosine` let all learning rates fall to a thousandth at the last step."""
    update: Literal["summed", "per_task"] = "summed"
    """How the losses of several tasks update what they share. `summed` adds them up. `per_task` gives each
    task a state of its own in every optimizer, and adds up the updates (AdaTask), see docs/schedules.md."""
    tables: TableRatesConfig = TableRatesConfig()
    """Another warm-up or decay for the learning rates of the tables, which are
    groups.<name>.learning_rate."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; `evaluate` and `export` of this run compute there, too. `auto` gives each rank
    a GPU where there are some that the installed builds can use; otherwise it takes the CPU and says why.
    `cuda` and `cpu` mean there and nowhere else."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """The precision of everything dense in training. `bf16` multiplies in bfloat16; the weights, the
    looked-up vectors and the loss stay fp32. Evaluation is always fp32."""
    pipeline: Literal["auto", "none", "sparse_dist", "prefetch"] = "auto"
    """TorchRec's train pipeline. `sparse_dist` copies later batches and exchanges their ids meanwhile.
    `prefetch` also fills the tables' caches meanwhile; it is for CUDA only, and without such caches it is the
    same as `sparse_dist`. `auto` means `sparse_dist` on CUDA and `none` on a CPU, which has nothing to
    overlap. The losses are the same in all of them."""
    log_every: PositiveInt = 10
    """The number of steps between two lines of metrics.jsonl."""
    watch_gradients: int = Field(0, ge=0)
    """Every how many steps the gradients of the tables are told apart by role, attention and representation.
    Their norms and cosines are reported in metrics.jsonl, see docs/schedules.md. 0 means never. What is
    trained is the same."""
    validate_every: int = Field(0, ge=0)
    """The number of steps between two validations. 0 means only one at the end."""
    validate_candidates: int = Field(500_000, ge=0)
    """About the largest number of candidates that a validation in training scores. Of a larger validation
    split it scores a sample of whole users, which is the same at every validation and on any number of ranks.
    0 means the whole split, whatever its size. `tandemrec evaluate` always takes the whole split."""
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    """When training ends before its last step, see [train.early_stopping]. It needs `validate_every`."""
    init_from: PlaceText = ""
    """A run, or tables written by `unshard`, whose weights a new run starts with. See docs/checkpoints.md.
    Empty means a start from random weights."""
    init_optimizer: Literal["carry", "fresh"] = "carry"
    """`carry` takes the accumulators of the tables' rows from `init_from` as well. `fresh` starts them
    anew."""
    timeout_s: float = Field(600, gt=0)
    """The number of seconds that ranks wait for each other in one collective before they give up."""
    max_starts_without_progress: int = Field(5, ge=0)
    """A run is refused after this number of starts from the same step. 0 means no limit."""

    @model_validator(mode="after")
    def _check_together(self) -> TrainConfig:
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
    """What the vectors of tables and their gradients are rounded to where ranks exchange them."""

    forward: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the vectors of the tables are rounded to."""
    backward: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the gradients of these vectors are rounded to."""


class CheckpointConfig(Settings):
    """When to save besides the end of training and a stop signal, and how. See docs/checkpoints.md."""

    every_steps: int = Field(1000, ge=0)
    """The number of steps between two saves. 0 means that no save is due by steps."""
    every_minutes: float = Field(0.0, ge=0)
    """The number of minutes between two saves, by the clock of rank 0. 0 means that no save is due by
    time."""
    check_every: PositiveInt = 10
    """The number of steps between two moments at which the ranks agree whether a stop was asked for, whether
    the minutes are over, and whether a save in the background failed. A run of one rank looks after every
    step."""
    keep: PositiveInt = 2
    """The number of newest checkpoints that are kept. Damaged ones do not count."""
    mode: Literal["auto", "async", "sync"] = "auto"
    """`async` copies the tensors and writes them while training goes on. `sync` writes them first, and needs
    no memory for a copy. `auto` means `async` where the copy fits into the memory that is free at the first
    save, or with `full_every` above 1 at each, and `sync` otherwise; it says which."""
    full_every: PositiveInt = 1
    """Every how many saves one is full. The saves between write only the rows of the tables that were looked
    up since the save before, and build on it. 1 means that every save is full."""
    on_error: Literal["stop", "continue"] = "stop"
    """What happens when a save fails during training. `stop` ends the run; `continue` tries again when the
    next save is due. The save at the end always stops."""
    timeout_minutes: float = Field(60.0, gt=0)
    """The longest time, in minutes, that ranks wait for each other's files while saving. A rank that is gone
    is missed sooner, after `train.timeout_s`."""
