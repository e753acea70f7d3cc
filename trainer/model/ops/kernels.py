"""Where Triton's kernels can run, and the sizes that they are given."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch

from trainer.sealed_folder import voice

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


@cache
def agrees(compare: Callable[[torch.device], bool], what: str, device: torch.device) -> bool:
    """Whether a kernel does here what its plain form does; looked at once a process, before it is first used.

    A kernel is never needed for being right, so one that does not compile, start or agree on this device,
    with this driver and release of Triton, is left out, and rank 0 says so.

    Args:
        compare: runs both forms on a small example; what: the operator, for the message.
    """
    try:
        with torch.autocast(device.type, enabled=False):
            if compare(device):
                return True
        problem = "its answers differ from those of torch's own operators"
    except Exception as error:  # whatever the compiler, the driver or the launch has to say
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    voice.say(f"{what}: the Triton kernel is not used on this device, torch's own operators are ({problem})")
    return False


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << (number - 1).bit_length()
