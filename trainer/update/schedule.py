"""Learning rates over a run: warm-up, then decay; one schedule for dense weights, one for tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.sections import Decay, TrainConfig

_FLOOR = 1e-3
# A warm-up given in steps takes no larger share of the run, so that a short run reaches its rates at all.
_LONGEST_WARMUP = 0.2
# Fewer steps are worth a word, and as many as these are advised.
_FEW_STEPS, _ENOUGH_STEPS = 100, 300
# Candidates of a step; fewer make it noise.
_SMALL_BATCH = 64


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


def dense_schedule(config: TrainConfig, steps: int = 0) -> Schedule:
    """Of everything outside the tables; `steps`: of the whole run, 0 = nobody knows."""
    return Schedule(_warmup(config.warmup_steps, config.warmup, steps), config.decay)


def table_schedule(config: TrainConfig, steps: int = 0) -> Schedule:
    """The same, but for what `train.tables` sets."""
    tables = config.tables
    own = tables.warmup_steps is not None or tables.warmup is not None
    source = tables if own else config
    warmup = _warmup(source.warmup_steps, source.warmup or 0.0, steps)
    return Schedule(warmup, config.decay if tables.decay is None else tables.decay)


def _warmup(asked: int | None, share: float, steps: int) -> int:
    """Steps of a warm-up: so many as asked for, but no more than a part of the run; or a share of it."""
    if asked is None:
        return round(share * steps)
    return min(asked, max(1, math.ceil(_LONGEST_WARMUP * steps))) if steps and asked else asked


def run_steps(config: TrainConfig, epoch_candidates: int, batch_candidates: int) -> int:
    """About how many steps a run has: blocks are not cut, so that its steps are a little larger and fewer."""
    by_data = config.epochs * math.ceil(epoch_candidates / batch_candidates)
    return min(by_data, config.max_steps) if config.max_steps else by_data


def schedule_remarks(config: TrainConfig, epoch_candidates: int, batch_candidates: int) -> list[str]:
    """What a user should know of a short run before it starts."""
    steps = run_steps(config, epoch_candidates, batch_candidates)
    asked = {
        "train.warmup_steps": config.warmup_steps,
        "train.tables.warmup_steps": config.tables.warmup_steps,
    }
    lines = [
        f"{key} = {length:,} is more than a fifth of the run's {steps:,} steps or so: the warm-up takes "
        f"{_warmup(length, 0.0, steps):,} (set a share of the run instead, such as train.warmup = 0.05)"
        for key, length in asked.items()
        if length and _warmup(length, 0.0, steps) < length
    ]
    stopping, every = config.early_stopping, config.validate_every
    if stopping.on and every * (stopping.patience + 1) > steps:
        lines.append(
            f"train.early_stopping cannot end this run early: {stopping.patience} validations "
            f"without gain after a first one are {every * (stopping.patience + 1):,} steps, and the run has "
            f"{steps:,} or so; lower train.validate_every or train.early_stopping.patience"
        )
    if steps < _FEW_STEPS and not (config.max_steps and config.max_steps <= steps):
        wanted = config.epochs * epoch_candidates // _ENOUGH_STEPS
        batch = min(batch_candidates, max(_SMALL_BATCH, wanted))
        epochs = max(config.epochs, math.ceil(_ENOUGH_STEPS * batch / epoch_candidates))
        lines.append(
            f"a short run: about {steps:,} step(s) of {batch_candidates:,} candidates from "
            f"{epoch_candidates:,} a pass, in which little is learnt; {_ENOUGH_STEPS} steps would be "
            f"data.batch_candidates = {batch} with train.epochs = {epochs}"
        )
    return lines


def progress_of(config: TrainConfig, step: int, candidates: int, epoch_candidates: int) -> float:
    """Share of the run done: by steps where max_steps is set, by candidates of all epochs otherwise."""
    by_data = candidates / max(1, config.epochs * epoch_candidates)
    by_steps = step / config.max_steps if config.max_steps else 0.0
    return min(1.0, max(by_data, by_steps))
