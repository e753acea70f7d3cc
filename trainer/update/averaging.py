"""Averages of the dense weights over a phase, kept beside the weights.

An average after step K of a phase is sum_k a_k theta_k / sum_k a_k over k = 0..K, where theta_0 are the
weights at the phase's start and theta_k those after its step k. With `beta`, a_k is the density of the
symmetric Beta distribution at (k + 0.5) / (K + 1) (the Beta moving average of CLIPood, 2023): so K must
be known before. With `ema`, a_k falls by the factor `decay` from one step to the one before it.

Sums are float64. The tables take no part: their rows are those of the newest step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from embeddings.errors import ConfigError
from trainer.config.phases import AverageConfig


class Average:
    """The average of some tensors, as they are now and after each step that follows.

    Args:
        settings: a kind that is on; phase: its name, for messages.
        weights: by name; they are read after each step. Whole numbers among them (a count of batches) have no
            average and are left out. Running statistics are averaged as weights are.
        steps: K, which `beta` must know; None = nobody knows.

    Attributes:
        averages: by name, float64.
        done: steps that were added since the phase's start.
    """

    def __init__(
        self, settings: AverageConfig, phase: str, weights: Mapping[str, Tensor], steps: int | None = None
    ) -> None:
        if settings.kind == "beta" and steps is None:
            raise ConfigError(
                f'phase {phase}: average.kind = "beta" must know the number of steps; set phases.steps'
            )
        self._settings, self._phase, self._steps = settings, phase, steps
        self._weights = {name: each.detach() for name, each in weights.items() if each.is_floating_point()}
        # Side by side: one addition for all of them.
        sizes = [each.numel() for each in self._weights.values()]
        self._side_by_side = torch.zeros(sum(sizes), dtype=torch.float64, device=_device(self._weights))
        self.averages = {
            name: part.view(self._weights[name].shape)
            for name, part in zip(self._weights, self._side_by_side.split(sizes), strict=True)
        }
        self.done, self._total = -1, 0.0
        self.add()

    def add(self) -> None:
        """Take the weights as they are now into the average.

        Raises:
            ConfigError: there are more steps than were foreseen.
        """
        if self._settings.kind == "beta" and self.done == self._steps:
            raise ConfigError(
                f"phase {self._phase}: its average was to be over {self._steps:,} steps, and here is one "
                'more; set phases.steps to the steps that there are, or average.kind = "ema"'
            )
        self.done += 1
        if self._weights:
            now = torch.cat([each.flatten().double() for each in self._weights.values()])
            self._side_by_side.lerp_(now, self._share())

    def _share(self) -> float:
        """a_k by the sum of a_0 to a_k, for the step that is being added."""
        if self._settings.kind == "ema":
            decay = self._settings.decay
            if decay == 0:
                return 1.0
            # (1 - decay) / (1 - decay ** (k + 1)); so written, it is exact for a decay near 1, too.
            return math.expm1(math.log(decay)) / math.expm1((self.done + 1) * math.log(decay))
        assert self._steps is not None
        weight = beta_density(self._settings.beta, self.done, self._steps)
        self._total += weight
        # A sharp density is 0 at its ends.
        return weight / self._total if self._total else 1.0

    @property
    def missing(self) -> int:
        """Steps of the phase that are still to be added; 0 where nobody knows."""
        return self._steps - self.done if self._steps is not None else 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides `averages`, as JSON."""
        return {**_rule(self._settings, self._steps), "done": self.done, "total": self._total}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` said; the caller fills `averages`.

        Raises:
            ConfigError: that average was of another kind.
        """
        for key, now in _rule(self._settings, self._steps).items():
            if state[key] != now:
                raise ConfigError(
                    f"phase {self._phase}: its average began with {key} = {state[key]!r}, now it is {now!r}; "
                    "set it back, or name another --out"
                )
        self.done, self._total = state["done"], state["total"]

    @torch.no_grad()
    def adopt(self) -> None:
        """Make the average the weights."""
        for name, weight in self._weights.items():
            weight.copy_(self.averages[name])


def beta_density(beta: float, k: int, steps: int) -> float:
    """Of the Beta distribution with both parameters `beta`, at (k + 0.5) / (steps + 1).

    Divided by that at 1/2, which every sum of weights is divided by, too: so no number is too large.
    """
    # 1 - x is computed as what x is at the other end, so that both ends weigh the same to the bit.
    x, other = ((place + 0.5) / (steps + 1) for place in (k, steps - k))
    return float((4 * x * other) ** (beta - 1))


def _rule(settings: AverageConfig, steps: int | None) -> dict[str, Any]:
    """What may not change within a phase."""
    if settings.kind == "beta":
        return {"kind": "beta", "beta": settings.beta, "steps": steps}
    return {"kind": settings.kind, "decay": settings.decay}


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next((each.device for each in tensors.values()), torch.device("cpu"))
