"""The update rule of today: the losses of all tasks are added up, and one backward pass serves them all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.model.border import Cut
from trainer.objectives.step_loss import Losses


class Summed:
    """What a step trains by, before and after the backward pass, which TorchRec's pipelines start themselves.

    Another rule would differ here and nowhere else: in which losses go backward together, and in the
    gradients that the tables are given for it.
    """

    def loss(self, losses: Losses) -> Tensor:
        """What the backward pass starts from, scalar."""
        return losses.total()

    def gradients(self, cuts: Sequence[Cut]) -> dict[str, Tensor]:
        """Group -> the gradient of the vectors that were looked up in it, after the backward pass."""
        return {cut.group: cut.gradient() for cut in cuts}
