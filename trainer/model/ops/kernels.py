"""Where Triton's kernels can run, and the sizes that they are given."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

# The oldest compute capability that the wheels of torch and fbgemm have code for.
_OLDEST = (8, 0)


@cache
def has_kernel(device: torch.device) -> bool:
    """Whether Triton is there and has code for this device."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.is_available()
        and importlib.util.find_spec("triton") is not None
        and torch.cuda.get_device_capability(device) >= _OLDEST
    )


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()
