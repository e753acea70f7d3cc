"""Differences, memory, and where the host waits for the device."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.check import ROOT

OURS = ("embeddings", "trainer", "pipelines", "benchmarks")


def difference(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| by the Euclidean norm, in double precision on the CPU."""
    a, b = (part.detach().cpu().double() for part in (found, wanted))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def memory() -> dict[str, float]:
    """Peaks in GB since the last `forget_memory`: what tensors took, and what the allocator had reserved."""
    if not torch.cuda.is_available():
        return {}
    taken, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated GB": round(taken / 1e9, 3), "reserved GB": round(reserved / 1e9, 3)}


def forget_memory() -> None:
    """Give freed memory back and count peaks anew."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def host_waits() -> Iterator[Counter[str]]:
    """Count where the host waits for the device, by line: `trainer/model/x.py:12` -> times.

    torch warns of each wait (`torch.cuda.set_sync_debug_mode`); the innermost line of the project is noted.
    Nothing is counted without CUDA.
    """
    found: Counter[str] = Counter()
    if not torch.cuda.is_available():
        yield found
        return

    def note(message: Any, _: Any, filename: str, line: int, *__: Any) -> None:
        if "synchroniz" in str(message):
            found[_line_of_ours() or f"{Path(filename).name}:{line}"] += 1

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def _line_of_ours() -> str:
    # The frames of this module itself are at the end.
    for frame in reversed(traceback.extract_stack()[:-2]):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return ""
