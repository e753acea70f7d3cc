"""When validation stops getting better: training ends, and the best checkpoint stays."""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config.sections import EarlyStoppingConfig
from trainer.quality.metrics import Metrics

_LOWER_IS_BETTER = {"logloss"}


@dataclass
class Best:
    """The best validation so far; checkpoints keep it, so that a resumed run stops where it would have.

    Attributes:
        value: of the metric, None before the first; step: at which; fruitless: validations since then.
    """

    value: float | None = None
    step: int = -1
    fruitless: int = 0

    def update(self, config: EarlyStoppingConfig, metrics: Metrics, step: int) -> bool:
        """Take a validation into account; -> whether it is the best. One without a value is never."""
        value = float(getattr(metrics, config.metric))
        sign = -1 if config.metric in _LOWER_IS_BETTER else 1
        better = math.isfinite(value)
        if better and self.value is not None:
            better = sign * (value - self.value) > config.min_delta
        if better:
            self.value, self.step, self.fruitless = value, step, 0
        else:
            self.fruitless += 1
        return better

    def over(self, config: EarlyStoppingConfig) -> bool:
        """Whether training has gone on for long enough without a better validation."""
        return config.on and self.fruitless >= config.patience
