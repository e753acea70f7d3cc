"""Adam of the dense weights, by their names; and the same with a state for each task (AdaTask)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizerWrapper

# What an exponential mean of squared updates keeps in each step.
_KEPT = 0.99
# The name of that mean in the state.
_SQUARES = "squared_update"


class DenseOptimizer(KeyedOptimizerWrapper):  # type: ignore[misc]
    """Adam of the dense weights, by their names.

    Attributes:
        fused: it is PyTorch's kernel that updates all weights at once and can leave a step out by itself.
    """

    fused = False

    def skip_where(self, alarm: Tensor) -> None:
        """The next step changes nothing where `alarm`, float32 scalar on the device, is 1 and not 0.

        `torch.amp.GradScaler` tells fused optimizers so in the same way (torch 2.13, optim/adam.py): weights
        and moments stay as they are, and the step does not count.
        """
        self._optimizer.found_inf = alarm

    def create_state(self) -> None:
        """Have the state that a first step would create; a checkpoint loaded before it would miss it.

        That step must not decay any weight, so it is done at rate 0, nor count for the correction of the
        moments' bias: the first true step would be taken for the second, and be 0.744 of what it should be.
        """
        self.init_state()
        for state in self.state.values():
            state["step"].zero_()


class PerTaskAdam(DenseOptimizer):
    """Adam with a state for each task that reaches a weight; the updates of the tasks are added up.

    AdaTask (arXiv 2211.15055, Algorithm 2): each task k has moments m_k, v_k of its own gradients g_k, and
    theta -= rate * sum_k m_k / (sqrt(v_k) + eps), both corrected for their bias. A task whose loss is in no
    part of a step changes neither weights nor its state, and that step does not count for it (ours).

    One of torch's own optimizers works for each task, on tensors of zeros that become the task's update and
    are then added to the weights: with one task the bits are those of plain Adam on a CPU.

    Args:
        weights: by name; reach: of each weight, the tasks whose losses reach it.
        make: parameters -> Adam.
        summed: some phases follow the other rule, whose state is kept beside that of the tasks.

    Attributes:
        squares: task -> weight -> exponential mean of its squared updates, of weights with several tasks.
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        reach: Mapping[str, Sequence[str]],
        make: Callable[[list[Any]], torch.optim.Optimizer],
        summed: bool,
    ) -> None:
        super().__init__(weights, make)
        self._weights, self._summed = dict(weights), summed
        self._moves = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._of_tasks: dict[str, torch.optim.Optimizer] = {}
        self.squares: dict[str, dict[str, Tensor]] = {}
        for task in dict.fromkeys(task for tasks in reach.values() for task in tasks):
            own = [name for name, tasks in reach.items() if task in tasks]
            self._of_tasks[task] = make([self._moves[name] for name in own])
            self.squares[task] = {
                name: torch.zeros_like(weights[name]) for name in own if len(reach[name]) > 1
            }
        self._given: Mapping[str, Mapping[str, Tensor]] | None = None
        self._alarm: Tensor | None = None

    def create_state(self) -> None:
        if self._summed:
            super().create_state()
        names = {id(move): name for name, move in self._moves.items()}
        for task, optimizer in self._of_tasks.items():
            (group,) = optimizer.param_groups
            rate, group["lr"] = group["lr"], 0.0
            for move in group["params"]:
                move.grad = torch.zeros_like(move)
            optimizer.step()
            group["lr"] = rate
            for move in group["params"]:
                move.grad, state = None, optimizer.state[move]
                state["step"].zero_()
                name = names[id(move)]
                # The same tensors: what is loaded into these is loaded into the task's optimizer.
                named = {f"{task}.{key}": value for key, value in state.items()}
                if name in self.squares[task]:
                    named[f"{task}.{_SQUARES}"] = self.squares[task][name]
                self._optimizer.state[self._weights[name]].update(named)

    def skip_where(self, alarm: Tensor) -> None:
        self._alarm = alarm
        for optimizer in (self._optimizer, *self._of_tasks.values()):
            optimizer.found_inf = alarm

    def give(self, gradients: Mapping[str, Mapping[str, Tensor]]) -> None:
        """What the next step updates by: task -> weight -> gradient. Without it that is one of plain Adam."""
        self._given = gradients

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        given, self._given = self._given, None
        if given is None:
            if self._summed:
                super().step(closure)
            return
        (rates,) = self.param_groups
        new: Any = 1 - _KEPT if self._alarm is None else (1 - _KEPT) * (1 - self._alarm)
        for task, gradients in given.items():
            optimizer = self._of_tasks[task]
            for group in optimizer.param_groups:
                group["lr"] = rates["lr"]
            for name, gradient in gradients.items():
                self._moves[name].zero_().grad = gradient
            optimizer.step()
            for name in gradients:
                move, weight = self._moves[name], self._weights[name]
                weight.add_(move)
                move.grad = None
                if name in self.squares[task]:
                    self.squares[task][name].lerp_(move.square_(), new)


def reached_by(
    weights: Mapping[str, nn.Parameter],
    owned: Mapping[str, Iterable[nn.Parameter]],
    tasks: Mapping[str, Sequence[str]],
) -> dict[str, tuple[str, ...]]:
    """Of each weight, the tasks whose losses reach it.

    Args:
        owned: tower -> the weights that no other tower has.
        tasks: with a loss -> the towers that it reaches: its own, or the factors of a product.
    """
    owners = {id(weight): tower for tower, own in owned.items() for weight in own}
    return {
        name: tuple(
            task for task, towers in tasks.items() if id(weight) not in owners or owners[id(weight)] in towers
        )
        for name, weight in weights.items()
    }
