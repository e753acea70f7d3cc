"""Single precision inside `torch.autocast`: for searches, scores and sums over behaviors.

Autocast halves every matrix product, in an operator that promises float32 too. What stays float32 and what
does not is a table in docs/training.md.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_halved(device: torch.device) -> bool:
    """Whether autocast is on for products of the device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def in_single_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which products are what their factors are; `full` makes these float32."""
    return torch.autocast(device.type, enabled=False) if is_halved(device) else nullcontext()


def full(part: Tensor) -> Tensor:
    """In single precision at least, whatever autocast made of it."""
    return part.float() if part.dtype in (torch.bfloat16, torch.float16) else part
