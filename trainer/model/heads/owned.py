"""Attention that one task owns: the head runs again on what weights without a gradient pooled.

No other task's loss then reaches the weights, and so none of what scores are made of: attention tables,
projections, biases of time. It is STEM's mask on another producer. Values are the same in all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.model.heads.head import HeadOutput


class OwnedAttention(nn.Module):
    """Which run of the head each task's logits come from.

    Args:
        owners: branch -> the task that owns its attention weights, empty = all tasks do.
        tasks: names of those with a tower.
        experts: whether the head gives experts for a loss that is no task's, their covariance.

    Attributes:
        runs: of each run, the branches whose weights pass no gradient on; the last has the most of them, and
            with `experts` all that are owned, if that takes a run of its own.
        of_task: the run of each task.
    """

    def __init__(self, owners: Mapping[str, str], tasks: Sequence[str], experts: bool = False) -> None:
        super().__init__()
        stopped = [
            frozenset(branch for branch, owner in owners.items() if owner not in ("", task)) for task in tasks
        ]
        owned = frozenset(branch for branch, owner in owners.items() if owner)
        every = {*stopped, owned} if experts else set(stopped)
        self.runs = sorted(every, key=lambda branches: (len(branches), sorted(branches)))
        self.of_task = [self.runs.index(branches) for branches in stopped]

    def live(self, branch: str) -> list[bool]:
        """Of each task, whether its loss reaches the weights of a branch."""
        return [branch not in self.runs[run] for run in self.of_task]

    def forward(self, outputs: Sequence[HeadOutput]) -> HeadOutput:
        """What the runs gave -> each task's own columns.

        The covariance of experts is no task's loss: it takes those of the last run, which reach no owned
        attention.
        """
        bases = [output.base for output in outputs if output.base is not None]
        logits_CT = columns([output.logits for output in outputs], self.of_task)
        base_CT = columns(bases, self.of_task) if bases else None
        return HeadOutput(logits_CT, base_CT, outputs[-1].experts)


def columns(parts: Sequence[Tensor], chosen: Sequence[int]) -> Tensor:
    """Of parts [C, T], column t of part number chosen[t]: [C, T]."""
    return torch.stack([parts[run][:, task] for task, run in enumerate(chosen)], dim=1)
