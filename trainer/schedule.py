"""Learning-rate schedule shared by all optimizers."""

from __future__ import annotations

from trainer.config import TrainConfig

_FLOOR = 1e-3


def rate_factor(config: TrainConfig, step: int, progress: float) -> float:
    """What every learning rate is multiplied by at a step.

    Args:
        config: warm-up steps and kind of decay.
        step: steps done so far.
        progress: share of the run done so far, in [0, 1]; see `progress_of`.
    """
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.decay == "none":
        return warm
    return warm * max(_FLOOR, 1.0 - progress)


def progress_of(config: TrainConfig, step: int, candidates: int, epoch_candidates: int) -> float:
    """Share of the run done: by steps where max_steps is set, by candidates of all epochs otherwise."""
    by_data = candidates / max(1, config.epochs * epoch_candidates)
    by_steps = step / config.max_steps if config.max_steps else 0.0
    return min(1.0, max(by_data, by_steps))
