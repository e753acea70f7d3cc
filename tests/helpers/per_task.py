"""AdaTask written out: one table for each feature, a state for each row and task, and nothing fused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from embeddings.groups import TableName
from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import local_shards
from pipelines.start import open_split
from tests.helpers.models import model_of
from tests.helpers.tables import whole_tensor
from trainer.assemble import ShardedModel, build_sharded, feature_rows
from trainer.data.reader import SequenceLogReader, Step
from trainer.log.schema import read_manifest
from trainer.loop.pipeline import Pipeline
from trainer.model.frame import TwoStageModel
from trainer.objectives.losses import rank_loss
from trainer.objectives.step_loss import StepLoss
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config
from trainer.update.guard import Guard
from trainer.update.step import TrainStep, run_optimizer

PER_TASK = "train.update=per_task"
# Two losses reach what belongs to click.
PRODUCT = [
    "tasks.click.weight=1", "tasks.cvr.label=conversion", "tasks.cvr.loss=none",
    'tasks.conversion.product=["click","cvr"]',
]  # fmt: skip
# Nothing beside gradients of large losses.
SMALL_EPS = [f"groups.{name}.eps=1e-16" for name in ("attention", "representation")]
BETAS, EPS = (0.9, 0.999), 1e-8


def owned_sets(foreign: str) -> list[str]:
    return ['groups.representation.sets="tasks"', f"model.experts.foreign={foreign}"]


class Training(NamedTuple):
    config: Config
    sharded: ShardedModel
    optimizer: Any
    step: TrainStep
    pipeline: Pipeline
    reader: SequenceLogReader

    def steps(self, count: int | None = None) -> Iterator[Step]:
        """Train, and give each step."""
        for step, _ in self.pipeline.train(islice(self.reader.steps(), count)):
            yield step

    def folded(self) -> dict[str, Tensor]:
        """All weights by name, float32, with lanes added to their main tables."""
        return fold(self.sharded.model.state_dict())


def training(
    config: Config, ranks: Ranks, folder: Path, way: str = "none", late: bool | None = None
) -> Training:
    sharded = build_sharded(config, read_manifest(config.data.log), ranks)
    optimizer = run_optimizer(sharded.model, config, late)
    step = TrainStep(config, sharded.model, optimizer, ranks.world_size, Guard(ranks, folder, late))
    pipeline = Pipeline(way, sharded.model, step, ranks.device)
    reader = open_split(config, "train", feature_rows(sharded.groups), ranks, seed=3)
    return Training(config, sharded, optimizer, step, pipeline, reader)


def differences(weights: dict[str, Tensor], others: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((a - others[name]).norm() / a.norm()) for name, a in weights.items() if a.any()}


def fold(state: Mapping[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in state.items():
        table = TableName.of(table_of(name))
        key = plain_name(name)
        if table is not None and table.lane:
            key = key.removesuffix(f"/{table.lane}")
            found[key] = found[key] + whole_tensor(weight)
        else:
            found[key] = whole_tensor(weight).clone()
    return found


def pieces(state: Mapping[str, Any]) -> dict[str, list[tuple[int, int, Tensor]]]:
    """Of each weight, the parts on this rank: first row, first column, numbers."""
    return {
        name: [(row, column, part.detach().clone()) for part, row, column in local_shards(weight)]
        for name, weight in state.items()
    }


def whole(of_ranks: Sequence[Mapping[str, Sequence[tuple[int, int, Tensor]]]]) -> dict[str, Tensor]:
    """Weights in one piece, of the `pieces` of all ranks."""
    found = {}
    for name in of_ranks[0]:
        parts = [part for each in of_ranks for part in each[name] if part[2].numel()]
        if parts[0][2].dim() != 2:
            found[name] = parts[0][2]
            continue
        rows = max(row + len(part) for row, _, part in parts)
        weight = torch.full((rows, max(column + part.shape[1] for _, column, part in parts)), torch.nan)
        for row, column, part in parts:
            weight[row : row + len(part), column : column + part.shape[1]] = part
        found[name] = weight
    return found


def plain_name(name: str) -> str:
    """The name of a weight in a model over plain tables."""
    if name.startswith("collections."):
        return f"collections.{name.split('.')[1]}.{table_of(name)}" if name.endswith(".weight") else name
    return name


class Reference:
    """A model over plain tables, which starts with the weights of a sharded one."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor]) -> None:
        self.config, self.model = config, model_of(config.without_lanes())
        self.named = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in self.named.items():
                weight.copy_(weights[name])
        self.losses = StepLoss(self.model.tasks, config.train.objective, 0)
        self.losses.by_task = True
        self.states: dict[tuple[str, str], list[Tensor]] = {}
        self.done: dict[tuple[str, str], int] = {}

    def train(self, step: Step, rate: float) -> None:
        model: TwoStageModel = self.model.train()
        losses = self.losses.of(step, model(step.batch), self.config.model.auxiliary_weight)
        names = list(self.named)
        moves = {name: torch.zeros_like(weight) for name, weight in self.named.items()}
        weights = [self.named[name] for name in names]
        for task, added in losses.by_task.items():
            loss = rank_loss(added, step.batch.step_candidates, 1, step.counted)
            found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, found, strict=True):
                if gradient is not None:
                    moves[name] += self._move(name, task, gradient, rate)
        with torch.no_grad():
            for name, move in moves.items():
                self.named[name].add_(move)

    def _move(self, name: str, task: str, gradient: Tensor, rate: float) -> Tensor:
        key = name, task
        if name.startswith("collections."):
            group = self.config.groups[name.split(".")[1]]
            if group.optimizer == "sgd":
                return -group.learning_rate * gradient
            (state,) = self.states.setdefault(key, [torch.zeros_like(gradient[:, :1])])
            whole = group.optimizer == "adagrad"
            state = state + (gradient.square() if whole else gradient.square().mean(1, keepdim=True))
            self.states[key] = [state]
            return -group.learning_rate * gradient / (state.sqrt() + group.eps)
        first, second = self.states.setdefault(key, [torch.zeros_like(gradient)] * 2)
        self.done[key] = step = self.done.get(key, 0) + 1
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
        self.states[key] = [first, second]
        mean, square = first / (1 - BETAS[0] ** step), second / (1 - BETAS[1] ** step)
        return -rate * mean / (square.sqrt() + EPS)
