"""How the C library keeps memory that a training step gives back."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 1 << 30


def keep_freed_memory() -> bool:
    """Leave what is freed in the process, for the next step; whether the C library could be told so.

    By default glibc returns tensors of some megabytes to the system at once, so that every step has all its
    memory mapped and cleared anew: half of its processor time at L = 4,000. The process stays at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # A negative threshold is the largest one: never.
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 64 << 20))
    return all([mallopt(name, value) == 1 for name, value in settings])
