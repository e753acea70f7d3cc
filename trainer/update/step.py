"""One training step: forward, loss, backward up to the tables, a check, backward into the tables, update."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer
from torchrec.optim.optimizers import in_backward_optimizer_filter

from embeddings.errors import ConfigError, DataError, hint_of
from embeddings.ids.new_rows import NewRows
from embeddings.lookup.rounding import AS_THEY_ARE, Comms
from embeddings.private import BatchNorm
from trainer.config.phases import UpdateRule
from trainer.config.sections import TrainConfig
from trainer.config.tasks import Task
from trainer.data.reader import Step
from trainer.model.border import Cut, Pull
from trainer.model.frame import TwoStageModel
from trainer.objectives.covariance import covariance_of
from trainer.objectives.losses import rank_loss
from trainer.objectives.retrieval import retrieval_loss_of
from trainer.objectives.step_loss import StepLoss, Tally
from trainer.run_config import Config
from trainer.update.dense_optimizer import DenseOptimizer, PerTaskAdam, reached_by
from trainer.update.dominance import Dominance
from trainer.update.gradient_watch import GradientWatch
from trainer.update.guard import Check, Gradients, Guard, dense_norm
from trainer.update.rules.per_task import PerTask, check_no_replicas
from trainer.update.rules.summed import Summed
from trainer.update.tied import TiedMaps


def make_optimizer(
    model: DistributedModelParallel,
    config: TrainConfig,
    fused: bool | None = None,
    rules: Iterable[str] = ("summed",),
    reach: Mapping[str, Sequence[str]] | None = None,
) -> CombinedOptimizer:
    """The fused optimizers of the tables and one for everything dense, as one.

    Args:
        fused: whether the dense one is PyTorch's fused kernel; None: where all dense weights lie on CUDA. Its
            state has the names, shapes and types of the other's, so that checkpoints fit both.
        rules: the update rules of all phases; reach: of `reach_of`, for `per_task`.
    """
    weights = dense_weights(model)
    if fused is None:
        fused = all(weight.device.type == "cuda" for weight in weights.values())

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if config.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=0.0, fused=fused or None)
        # Biases, scales and slopes are not decayed: zero is nothing they should be drawn to. The biases of
        # several experts stand in one matrix.
        biases = {id(weight) for name, weight in weights.items() if name.endswith("bias")}
        decayed = [each.dim() > 1 and id(each) not in biases for each in parameters]
        matrices = [each for each, decays in zip(parameters, decayed, strict=True) if decays]
        others = [each for each, decays in zip(parameters, decayed, strict=True) if not decays]
        groups = [(matrices, config.weight_decay), (others, 0.0)]
        return torch.optim.AdamW(
            [{"params": chosen, "weight_decay": decay} for chosen, decay in groups if chosen],
            lr=0.0,
            fused=fused or None,
        )

    if "per_task" in rules:
        dense: DenseOptimizer = PerTaskAdam(weights, reach or {}, make, "summed" in rules)
    else:
        dense = DenseOptimizer(weights, make)
    dense.fused = fused
    dense.create_state()
    for group in dense.param_groups:
        group["lr"] = config.learning_rate
    return CombinedOptimizer([("fused", model.fused_optimizer), ("dense", dense)])


def dense_weights(model: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """Parameters that no fused optimizer updates, by name."""
    return dict(in_backward_optimizer_filter(model.named_parameters()))


def run_optimizer(
    model: DistributedModelParallel, config: Config, fused: bool | None = None
) -> CombinedOptimizer:
    """That of a run, with a state for each task where its rule asks for it; `fused`: see `make_optimizer`."""
    return make_optimizer(model, config.train, fused, config.rules, reach_of(model, config))


def reach_of(model: DistributedModelParallel, config: Config) -> dict[str, tuple[str, ...]]:
    """Of each dense weight, the tasks whose losses reach it, for the rule `per_task`."""
    shell = model.module
    assert isinstance(shell, TwoStageModel)
    trained = config.lanes(shell.tasks)
    owned = {task.name: shell.own_parameters(task.name) for task in shell.tasks if task.has_tower}
    reached = {task.name: task.towers for task in shell.tasks if task.name in trained}
    return reached_by(dense_weights(model), owned, reached)


def dense_optimizer(optimizer: CombinedOptimizer) -> DenseOptimizer:
    """The one of everything dense, of those of `make_optimizer`."""
    (dense,) = (part for _, part in optimizer.optimizers if isinstance(part, DenseOptimizer))
    return dense


class RateSetter:
    """Sets the learning rates to multiples of what they were at the start, or of what `rebase` says."""

    def __init__(self, model: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
        self._fused = model.fused_optimizer
        # Parameter -> the name of its table group. A rank without a table of a group has none of it.
        names = {id(weight): name.split(".")[1] for name, weight in self._fused.params.items()}
        tables = {id(group) for group in self._fused.param_groups}
        self._groups: list[tuple[dict[str, Any], str | None]] = [
            (group, names.get(next(map(id, group["params"]), 0), "") if id(group) in tables else None)
            for group in optimizer.param_groups
        ]
        self._first = [float(group["lr"]) for group, _ in self._groups]
        self._base = self._first

    def rebase(self, dense: float | None = None, tables: Mapping[str, float] | None = None) -> None:
        """What multiples are taken of from now on; what is not given has the rate of the start.

        Args:
            tables: name of a table group -> rate.
        """
        given = [dense if name is None else (tables or {}).get(name) for _, name in self._groups]
        self._base = [first if rate is None else rate for rate, first in zip(given, self._first, strict=True)]

    def set(self, dense: float, tables: float) -> None:
        """In force from the next backward pass on."""
        for (group, name), base in zip(self._groups, self._base, strict=True):
            group["lr"] = base * (dense if name is None else tables)
        # The kernels keep a copy of the rate, which only this call renews; it updates no weight.
        self._fused.step()


class TrainStep:
    """A training step in the pieces that TorchRec's pipelines call.

    A pipeline calls `zero_grad`, `forward`, the loss' `backward()`, then `step`: it takes this object for its
    optimizer. The graph is cut between tables and everything dense (`trainer.model.border`), so that the
    pipeline's backward pass reaches dense weights and looked-up vectors only. `step` checks all gradients and
    only then has the second backward pass update the tables. Which losses go backward together is the update
    rule's business.

    Args:
        model: sharded; optimizer: of `make_optimizer`; world_size: ranks.
        guard: stops the run where something is not finite; None: no check, no cut and no clipping, for
            measuring what these cost. One that reads late needs the fused dense optimizer.

    Attributes:
        losses: what the step trains by.
        number: of the newest step, for messages; a run that goes on sets it.
        tied: maps of domains that are held equal, or None.
        new_rows: begins the rows anew that a step gives to new ids, or None where no ids come and go.
    """

    def __init__(
        self,
        config: Config,
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        world_size: int,
        guard: Guard | None,
    ) -> None:
        self._auxiliary_weight, self._config = config.model.auxiliary_weight, config.train
        self._model, self._optimizer, self._world_size, self._guard = model, optimizer, world_size, guard
        shell = model.module
        assert isinstance(shell, TwoStageModel)
        self._lookups, self._dense = shell.lookups, dense_weights(model)
        self._domains, self._settings = shell.domains, config.model
        self._covariance = covariance_of(config.model)
        self._comms: Comms = getattr(model, "comms", AS_THEY_ARE)
        # The one thing that a forward pass changes: running statistics of batch normalisation.
        norms = [module for module in shell.modules() if isinstance(module, BatchNorm)]
        self._statistics = [buffer for module in norms for buffer in module.buffers()]
        self._statistics_before: list[Tensor] = []
        self._tasks = shell.tasks
        self.losses = self._losses_of(shell.tasks)
        # Weights that only one task reaches.
        towers = [task.name for task in shell.tasks if task.has_tower]
        self._own = {name: shell.own_parameters(name) for name in towers}
        self._silent: Collection[str] = ()
        self.number = 0
        self.tied: TiedMaps | None = None
        self.new_rows: NewRows | None = None
        self._step: Step | None = None
        self._loss = torch.zeros(())
        self._cuts: list[Cut] = []
        self._unread: Check | None = None
        self._dense_optimizer = dense_optimizer(optimizer)
        self._shell, self._reach = shell, reach_of(model, config)
        self._watch: GradientWatch | None = None
        if every := config.train.watch_gradients:
            self._watch = GradientWatch(shell, every, world_size, config.train.seed)
        first = config.phases[0].update if config.phases else None
        self._followed: UpdateRule | None = None
        self.follow(first or config.train.update)
        if guard is not None and guard.reads_late and not self._dense_optimizer.fused:
            raise ValueError("a guard that reads late needs make_optimizer(..., fused=True)")

    def follow(self, rule: UpdateRule) -> None:
        """Train by an update rule from the next step on.

        Raises:
            ConfigError: `per_task` with tables that lie on every rank.
        """
        if rule != self._followed:
            self._take_rule(rule)
        self.losses.by_task = self._rule.by_task

    def _take_rule(self, rule: UpdateRule) -> None:
        self._followed = rule
        self._rule: Summed | PerTask = Summed(self._dense)
        self._dominance: Dominance | None = None
        if rule == "per_task":
            check_no_replicas(self._model.plan)
            assert isinstance(self._dense_optimizer, PerTaskAdam)
            self._rule = PerTask(self._dense, self._reach, self._dense_optimizer, self._world_size)
            self._dominance = Dominance(
                self._model,
                self._lookups.groups,
                self._dense_optimizer,
                self._world_size,
                self._config.seed,
            )

    def _losses_of(self, tasks: Sequence[Task]) -> StepLoss:
        rank = dist.get_rank() if self._world_size > 1 else 0
        config = self._config
        return StepLoss(
            tasks,
            config.objective,
            self._domains,
            self._covariance,
            self._world_size,
            rank,
            config.mean,
            retrieval_loss_of(self._settings, tasks),
        )

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Train by other weights of tasks from now on; tasks that are not named have those of the config.

        Raises:
            ConfigError: there is no such task, or nothing is trained any more.
        """
        names = [task.name for task in self._tasks]
        if unknown := [name for name in weights if name not in names]:
            hint = hint_of(unknown[0], names, f"they are {', '.join(names)}")
            raise ConfigError(f"no task is called {unknown[0]!r}; {hint}")
        self.losses = self._losses_of(
            [replace(task, weight=weights.get(task.name, task.weight)) for task in self._tasks]
        )
        self.losses.by_task = self._rule.by_task

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def forward(self, step: Step) -> tuple[Tensor, Tally]:
        """-> what to call backward on, scalar, and what the step adds to the report. The step is on the
        device."""
        self._step, self.number, batch = step, self.number + 1, step.batch
        if self.new_rows is not None:
            self.new_rows.begin(step.new_rows)
        bf16 = self._config.precision == "bf16"
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=bf16), ExitStack() as opened:
            if self._guard is not None:
                self._statistics_before = [buffer.clone() for buffer in self._statistics]
            if self._guard is not None or not self._rule.wrapped:
                self._cuts = opened.enter_context(self._lookups.cut())
            if self._watch is not None:
                opened.enter_context(self._watch.watching(self.number))
            prediction = (self._model if self._rule.wrapped else self._shell)(batch)
        losses = self.losses.of(step, prediction, self._auxiliary_weight)
        self._loss, self._silent = losses.total().detach(), losses.silent
        given = batch.step_candidates, self._world_size, step.counted
        return self._rule.start(losses, lambda loss: rank_loss(loss, *given)), losses.tally

    def step(self) -> None:
        """Update all weights, or none.

        Raises:
            DataError: the loss or a gradient is not finite on some rank; raised on all ranks. A guard that
                reads late raises it in the next step, before that changes anything, or in `settle`.
        """
        cuts, self._cuts = self._cuts, []
        if self.tied is not None:
            self.tied.gather()
        pulls = self._rule.pulls(cuts)
        if self._watch is not None and self._step is not None:
            self._watch.collect(self._step.batch, self.number)
        gradients = [pull.gradient for pull in pulls]
        if self._guard is not None:
            with record_function("## check ##"):
                gradients = self._check(self._guard, cuts, pulls)
        if self._dominance is not None and self._step is not None:
            self._dominance.before(self._step.batch, self.number)
        if pulls:
            with record_function("## tables ##"):
                torch.autograd.backward([pull.inside for pull in pulls], gradients)
        if self._dominance is not None:
            self._dominance.after()
        for task in self._silent:
            # A gradient of zero would not do: Adam moves on by what it remembers.
            for weight in self._own[task]:
                weight.grad = None
        with record_function("## optimizer ##"):
            self._optimizer.step()
        if self.tied is not None:
            self.tied.spread()

    def report(self) -> dict[str, Any]:
        """What is to be said of the steps since the last call besides losses; collective."""
        dominance = {} if self._dominance is None else self._dominance.entry()
        return dominance if self._watch is None else {**dominance, **self._watch.entry()}

    def settle(self) -> None:
        """Read the answer to the last step's check, where the guard has not done so; collective if it is bad.

        Called before anything is made of a step: its loss reported, its weights measured or saved.

        Raises:
            DataError: that step is not finite.
        """
        check, self._unread = self._unread, None
        if check is not None:
            self._judge(check)

    def _check(self, guard: Guard, cuts: list[Cut], pulls: list[Pull]) -> list[Tensor]:
        """Clip the dense gradients where asked to; -> gradients of what was cut, all finite."""
        assert self._step is not None
        self.settle()
        dense, sent = self._rule.dense(), {}
        if self._comms.forward == "fp16":
            sent = {name: vectors for cut in cuts for name, vectors in cut.returned().items()}
        of_vectors = {pull.name: pull.gradient for pull in pulls}
        gradients = Gradients(self._loss, of_vectors, dense, sent)
        check = guard.check(self.number, self._step, gradients, self._comms.backward == "fp16")
        vectors = list(gradients.vectors.values())
        if guard.reads_late:
            # The device leaves everything as it was where the alarm is 1. Rows stay as they are under
            # gradients of zero, and so do their accumulators, by each of the row optimizers there is. A
            # product with zero would not do: zero times NaN is NaN.
            self._unread, bad = check, check.alarm > 0
            for buffer, before in zip(self._statistics, self._statistics_before, strict=True):
                buffer.copy_(torch.where(bad, before, buffer))
            self._dense_optimizer.skip_where(check.alarm)
            vectors = [torch.where(bad, 0.0, gradient) for gradient in vectors]
        else:
            self._judge(check)
        if check.largest is not None:
            self._comms.scale.fit(check.largest)
        if self._config.max_gradient_norm and dense:
            norm = dense_norm(list(dense.values()), wait=not guard.reads_late)
            limit = self._config.max_gradient_norm
            torch.nn.utils.clip_grads_with_norm_(list(self._dense.values()), limit, norm)
        return vectors

    def _judge(self, check: Check) -> None:
        """Raise where a checked step is not finite, with the running statistics as they were before it."""
        assert self._guard is not None
        try:
            self._guard.judge(check)
        except DataError:
            # A guard that reads late may have seen the forward pass of one more step, which changes them.
            for buffer, before in zip(self._statistics, self._statistics_before, strict=True):
                buffer.copy_(before)
            raise
