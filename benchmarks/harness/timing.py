"""Seconds, memory, and ratios of several ways to do the same work."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from embeddings.errors import TandemError

Way = TypeVar("Way")


class Seconds(NamedTuple):
    """Seconds of the wall clock, and processor seconds of all threads of this process."""

    wall: float
    cpu: float


@contextmanager
def one_thread() -> Iterator[None]:
    """A context or decorator in which torch computes on a single thread."""
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


def seconds_of(work: Callable[[], object]) -> Seconds:
    """The seconds of the work, with all that it gives a device to do."""
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
    return of([seconds_of(work).wall for _ in range(repeats)])


def spread(values: Sequence[float], name: str = "median") -> dict[str, float]:
    """Median (under `name`), `min`, `max` and `n` of measurements, as entries of a report's row."""
    return {name: statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def copy_rate(device: torch.device, floats: int, **how: Any) -> float:
    """Bytes a second that a copy reads and writes; `how` as in `single_seconds`."""
    source = torch.randn(floats, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * floats / single_seconds(lambda: target.copy_(source), **how)


def own_peak_bytes() -> int:
    """The most memory that was ever resident in this process."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# The kernel counts the memory of the process that starts another as the other's own: so this one is small.
_STARTER = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
code = subprocess.run(sys.argv[2:]).returncode
seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
figures = seconds, used.ru_utime + used.ru_stime, used.ru_maxrss, code
os.write(int(sys.argv[1]), json.dumps(figures).encode())
"""


def time_process(command: Sequence[str]) -> tuple[Seconds, int]:
    """Seconds of a process with all its threads, and the most memory that was resident in it, in bytes.

    Raises:
        TandemError: its exit code is not 0.
    """
    read, write = os.pipe()
    subprocess.run([sys.executable, "-c", _STARTER, str(write), *command], pass_fds=[write], check=True)
    os.close(write)
    with os.fdopen(read) as answer:
        wall, cpu, kib, code = json.load(answer)
    if code:
        raise TandemError(f"`{' '.join(command)}` failed with exit code {code}, see above")
    return Seconds(wall, cpu), 1024 * kib
