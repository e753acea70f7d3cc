"""JRC (Sheng et al. 2023), as released with "Understanding the Ranking Loss" (2024): two logits a task.

Its calibration part is the binary cross entropy of z1 - z0, which is the task's own loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.objectives.ranking import Compared


def jrc(given: Compared) -> Tensor:
    """Each candidate among all, by the logit of its own class; the model has a logit for either class."""
    assert given.base is not None
    # -log(e^z_y,i / sum_k w_k e^z_y,k): all candidates are compared on the class of candidate i.
    of_class = torch.where(given.positive, given.logits + given.base, given.base)
    among = torch.where(
        given.positive, given.logsumexp(given.logits + given.base), given.logsumexp(given.base)
    )
    return given.own_sums(torch.where(given.mixed, given.weight * (among - of_class), 0.0))


def everyone(given: Compared) -> Tensor:
    """A loss for each candidate."""
    return given.own_sums(given.mixed.double())
