"""Seconds, memory, and ratios of several ways to do the same work."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from embeddings.errors import TandemError

Way = TypeVar("Way")


class Seconds(NamedTuple):
    """By the clock on the wall, and of the processor in all threads of this process."""

    wall: float
    cpu: float


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on a single thread meanwhile; a decorator too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def wait_for_device() -> None:
    """Wait until the device has done all that it was given."""
    # Where nothing runs on CUDA, to ask it would open a context.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(work: Callable[[], object]) -> Seconds:
    """What the work takes, with all that it gives a device to do."""
    wait_for_device()
    started, started_cpu = time.perf_counter(), time.process_time()
    work()
    wait_for_device()
    return Seconds(time.perf_counter() - started, time.process_time() - started_cpu)


def rounds(
    ways: Mapping[Way, Callable[[], Seconds]],
    repeats: int,
    warm: int = 1,
    most: Mapping[Way, int] | None = None,
) -> dict[Way, list[Seconds]]:
    """Measure all ways in turn, so that a change of the machine's load meets each of them.

    Args:
        warm: rounds before those that count.
        most: of a way, rounds after which it is left out, because it is slow.
    """
    taken: dict[Way, list[Seconds]] = {way: [] for way in ways}
    for number in range(1 - warm, repeats + 1):
        for way, measure in ways.items():
            if number <= (most or {}).get(way, repeats):
                seconds = measure()
                if number > 0:
                    taken[way].append(seconds)
    return taken


def single_seconds(
    work: Callable[[], object],
    repeats: int,
    warm: int = 1,
    of: Callable[[list[float]], float] = statistics.median,
) -> float:
    """The wall's seconds of single calls: their median, or another figure `of` them."""
    for _ in range(warm):
        work()
    return of([timed(work).wall for _ in range(repeats)])


def spread(values: Sequence[float], name: str = "median") -> dict[str, float]:
    """Median (under `name`), `min`, `max` and `n` of measurements, as entries of a report's row."""
    return {name: statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def copy_rate(device: torch.device, floats: int, **how: Any) -> float:
    """Bytes a second that a copy reads and writes; `how` as in `single_seconds`."""
    source = torch.randn(floats, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * floats / single_seconds(lambda: target.copy_(source), **how)


def own_peak_bytes() -> int:
    """Most memory that was ever resident in this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def timed_process(command: Sequence[str], **options: Any) -> tuple[Seconds, int]:
    """Seconds of a process with all its threads, and the most memory that was resident in it, in bytes.

    Raises:
        TandemError: its exit code is not 0.
    """
    started = time.perf_counter()
    process = subprocess.Popen(command, **options)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = Seconds(time.perf_counter() - started, used.ru_utime + used.ru_stime)
    if process.returncode:
        raise TandemError(f"`{' '.join(command)}` failed with exit code {process.returncode}, see above")
    return seconds, 1024 * used.ru_maxrss
