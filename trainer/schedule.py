"""Learning rates over a run: warm-up, then decay; one schedule for dense weights, one for tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.sections import Decay, TrainConfig

_FLOOR = 1e-3


@dataclass(frozen=True)
class Schedule:
    """What a learning rate is multiplied by.

    Attributes:
        warmup_steps: it rises linearly over these; decay: how it falls to a thousandth at the end of the run.
    """

    warmup_steps: int
    decay: Decay

    def factor(self, step: int, progress: float) -> float:
        """`step`: steps done so far; `progress`: share of the run done so far, in [0, 1]."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        left = {
            "none": 1.0,
            "linear": 1.0 - progress,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
        }[self.decay]
        return warm * max(_FLOOR, left)


def dense_schedule(config: TrainConfig) -> Schedule:
    """Of everything outside the tables."""
    return Schedule(config.warmup_steps, config.decay)


def table_schedule(config: TrainConfig) -> Schedule:
    """The same, but for what `train.tables` sets."""
    tables = config.tables
    warmup = config.warmup_steps if tables.warmup_steps is None else tables.warmup_steps
    return Schedule(warmup, config.decay if tables.decay is None else tables.decay)


def progress_of(config: TrainConfig, step: int, candidates: int, epoch_candidates: int) -> float:
    """Share of the run done: by steps where max_steps is set, by candidates of all epochs otherwise."""
    by_data = candidates / max(1, config.epochs * epoch_candidates)
    by_steps = step / config.max_steps if config.max_steps else 0.0
    return min(1.0, max(by_data, by_steps))
