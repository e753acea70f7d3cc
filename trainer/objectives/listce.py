"""ListCE, the ranking part of RCR (Bai et al. 2023), as "Understanding the Ranking Loss" (2024) has it."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trainer.objectives.list import among_all
from trainer.objectives.ranking import Compared


def listce(given: Compared) -> Tensor:
    """The same as `list` with probabilities in place of exponentials of logits."""
    return among_all(given, F.logsigmoid(given.logits))
