"""What was trained since the last report."""

from __future__ import annotations

import time

import torch

from trainer.objectives.step_loss import Tally
from trainer.ranks.process_group import sum_over_ranks


class Meter:
    """What was trained since the last report.

    Attributes:
        candidates: of all ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._sums = device, list[torch.Tensor]()
        self.candidates = 0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def add(self, tally: Tally, candidates: int) -> None:
        if self._sums:
            self._sums = [before + now for before, now in zip(self._sums, tally, strict=True)]
        else:
            self._sums = list(tally)
        self.candidates += candidates

    def sums(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values, counts and total of the tallies of all steps and ranks; collective."""
        values, counts, total = (sum_over_ranks(part.to(self._device)) for part in self._sums)
        return values, counts, total

    def restart(self) -> None:
        self._sums, self.candidates = [], 0

    def take_time(self) -> tuple[float, float]:
        """Wall and CPU seconds of this process since the last call."""
        before = self._wall, self._cpu
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        return self._wall - before[0], self._cpu - before[1]
