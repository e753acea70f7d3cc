"""Single precision inside `torch.autocast`: for searches, scores and sums over behaviors.

Autocast halves every matrix product, in an operator that promises float32 too. What stays float32 and what
does not is a table in docs/training.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def in_single_precision(device: torch.device) -> torch.autocast:
    """A context in which products are what their factors are; `full` makes these float32."""
    return torch.autocast(device.type, enabled=False)


def full(part: Tensor) -> Tensor:
    """In single precision at least, whatever autocast made of it."""
    return part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
