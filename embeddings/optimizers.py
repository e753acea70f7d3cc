"""The optimizers of table rows: one record each, and everything that has to be known of one stands in it.

FBGEMM's kernels update rows inside the backward pass, and only those rows that were looked up. TorchRec picks
the kernel by the class of the optimizer (`optimizer_type_to_emb_opt_type` in torchrec/distributed/utils.py).
Data-parallel tables have no such kernel: a record's own `direction` updates them, and tests compare the
kernels with it.

A new optimizer is a new record in `ROW_OPTIMIZERS`, as docs/architecture.md shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrec.optim import RowWiseAdagrad

from embeddings.private import optimizer_class

State = Literal["none", "row", "weight"]
_FLOAT = 4


@dataclass(frozen=True)
class RowOptimizer:
    """One optimizer of table rows.

    Attributes:
        title: its name in messages.
        state: fp32 numbers that it keeps: `row`, one a row of each column shard, `weight`, one a weight, or
            `none`.
        kernel: the class by which TorchRec picks the kernel.
        arguments: learning rate and eps -> what the kernel is given.
        direction: gradient [rows, dim], the state and eps -> what is subtracted from the rows, times the
            learning rate. It updates the state, which is empty where there is none.
    """

    title: str
    state: State
    kernel: type[torch.optim.Optimizer]
    arguments: Callable[[float, float], dict[str, float]]
    direction: Callable[[Tensor, Tensor, float], Tensor]

    def state_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Of the state of a shard; (0,) where there is none."""
        shapes: dict[State, tuple[int, ...]] = {"none": (0,), "row": (rows,), "weight": (rows, columns)}
        return shapes[self.state]

    def state_bytes(self, rows: int, columns: int) -> int:
        """Of a shard; FBGEMM keeps the state in fp32 whatever the weights are."""
        return _FLOAT * torch.Size(self.state_shape(rows, columns)).numel()

    def state_reshards(self, before: str, after: str) -> bool:
        """Whether a table's state fits, row by row, when its sharding type changes.

        Each column shard keeps one number a row for its own columns. Nothing can make these into one number
        for the whole row, nor into those of other column shards.
        """
        by_columns = {"column_wise", "grid_shard"}
        return self.state != "row" or not by_columns & {before, after}


def _adagrad(gradient: Tensor, state: Tensor, eps: float) -> Tensor:
    state += gradient.square()
    return gradient / (state.sqrt() + eps)


def _rowwise_adagrad(gradient: Tensor, state: Tensor, eps: float) -> Tensor:
    state += gradient.square().mean(1)
    return gradient / (state.sqrt() + eps)[:, None]


def _rate_and_eps(rate: float, eps: float) -> dict[str, float]:
    return {"lr": rate, "eps": eps}


ROW_OPTIMIZERS: dict[str, RowOptimizer] = {
    "rowwise_adagrad": RowOptimizer(
        "row-wise Adagrad", "row", RowWiseAdagrad, _rate_and_eps, _rowwise_adagrad
    ),
    "adagrad": RowOptimizer("Adagrad", "weight", torch.optim.Adagrad, _rate_and_eps, _adagrad),
    "sgd": RowOptimizer(
        "SGD", "none", torch.optim.SGD, lambda rate, eps: {"lr": rate}, lambda gradient, *_: gradient
    ),
}
"""The optimizers of rows, by their names in `groups.<name>.optimizer`."""


@dataclass(frozen=True)
class FusedOptimizer:
    """How the rows of a group are updated inside the backward pass.

    Attributes:
        name: of one of `ROW_OPTIMIZERS`.
        learning_rate: step size before any schedule.
        eps: added to the root of the accumulator; unused by `sgd`.
        max_gradient: bound on every element of the gradient of every bag, before bags of one row are
            added up; 0 = none.
    """

    name: str = "rowwise_adagrad"
    learning_rate: float = 0.05
    eps: float = 1e-8
    max_gradient: float = 0.0

    @property
    def rule(self) -> RowOptimizer:
        return ROW_OPTIMIZERS[self.name]

    def arguments(self) -> dict[str, float]:
        return self.rule.arguments(self.learning_rate, self.eps)


def known_optimizer(name: str) -> str:
    """`name`, as a check of the configuration.

    Raises:
        ValueError: there is no such optimizer.
    """
    if name not in ROW_OPTIMIZERS:
        *others, last = (repr(each) for each in ROW_OPTIMIZERS)
        raise ValueError(f"must be {', '.join(others)} or {last}")
    return name


def optimizer_of(weight: Tensor) -> RowOptimizer:
    """The optimizer that a table was given (`attach_optimizer`); SGD where it has none."""
    kernel = optimizer_class(weight) or torch.optim.SGD
    return next(each for each in ROW_OPTIMIZERS.values() if each.kernel is kernel)
