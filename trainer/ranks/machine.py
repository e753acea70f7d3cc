"""What this process may use of its machine, and how it keeps memory that a step gives back.

A container sees the whole machine's memory and cores, and is killed or held back when it takes more than its
control group allows. Limits stand in files (kernel documentation, cgroup-v1/memory.rst and cgroup-v2.rst),
one folder a group; those of all groups above hold as well.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
# Of glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 1 << 30
_PAGE_OUT = 21  # MADV_PAGEOUT of Linux 5.4


class Heap(NamedTuple):
    """Bytes of the C library's heaps: in use, and free there for the next one who asks.

    The system may have the pages of free bytes back already; they count as free all the same.
    """

    used: int
    free: int


class _Mallinfo2(ctypes.Structure):
    """What mallinfo2 of glibc says (malloc.h): bytes are `size_t`, summed over all threads' heaps."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def this_machine() -> str:
    """What tells the ranks of this machine, or of this container, from those of others."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip() if boot.exists() else ''}"


def memory_bytes(process: Path = _PROCESS, groups: Path = _GROUPS) -> int:
    """Bytes that all processes of this control group may take: the machine's, or a limit below them.

    Args:
        process: the file that names this process's groups; groups: the folder where they are mounted.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [_number(folder / "memory.max") for folder in _folders("", process, groups)]
    limits += [_number(folder / "memory.limit_in_bytes") for folder in _folders("memory", process, groups)]
    return min(size for size in limits if size > 0)


def free_memory_bytes(
    process: Path = _PROCESS, groups: Path = _GROUPS, machine: Path = Path("/proc/meminfo")
) -> int:
    """Bytes that the processes of this control group may take besides what is taken already.

    What files occupy of memory without being looked at counts as free, since the system gives it back.
    """
    lines = (line.split() for line in _text(machine).splitlines())
    free = [1024 * int(words[1]) for words in lines if words[:1] == ["MemAvailable:"]]
    versions = (
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for controller, limit, usage, idle in versions:
        for folder in _folders(controller, process, groups):
            if allowed := _number(folder / limit):
                statistics = (line.split() for line in _text(folder / "memory.stat").splitlines())
                files = sum(int(words[1]) for words in statistics if words[:1] == [idle])
                free.append(max(0, allowed - _number(folder / usage) + files))
    return min(free, default=memory_bytes(process, groups))


def cores(process: Path = _PROCESS, groups: Path = _GROUPS) -> int:
    """Cores that this process may keep busy: those it may run on, or its share of time; at least one.

    A share of 2.5 cores counts as 2: more threads would wait for each other while they are held back.
    """
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for folder in _folders("", process, groups):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) // int(period))
    for folder in _folders("cpu", process, groups):
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_us > 0 and period_us > 0:
            limits.append(quota_us // period_us)
    return max(1, min(limits))


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


def return_freed_memory() -> bool:
    """Give the system all pages of the heaps on which nothing is in use; whether the C library can.

    glibc does so by itself at the end of a heap alone. What lies between blocks that are in use it keeps for
    the next one, in the heap of the thread that took it: whoever lets go of much, and asks for other sizes or
    in another thread, pays for both. It takes some milliseconds, in which threads wait that allocate.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(ctypes.c_size_t(0))
    return True


def heap_bytes() -> Heap | None:
    """What is in use of the heaps, and what is free; None where the C library does not tell (glibc 2.33)."""
    ask = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if ask is None:
        return None
    ask.restype = _Mallinfo2
    found = ask()
    return Heap(found.uordblks + found.hblkhd, found.fordblks)


def give_pages_back(address: int, size: int) -> None:
    """Have the system take the pages of a mapped file out of this process; a later look reads them again.

    Else a file that is read once counts as this process's memory for as long as there is room. It changes
    nothing of what is there, whatever it is, and where the system has no such call it does nothing.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), _PAGE_OUT)


def installed(distribution: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folders(controller: str, process: Path, groups: Path) -> Iterator[Path]:
    """The folders of this process's group and of all above it; no controller: those of version 2.

    In a container the file may name the group as the host sees it, which is not there; the container's own
    group is then the top of what is mounted.
    """
    for line in _text(process).splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controller not in controllers.split(","):
            continue
        tops = (groups, groups / "unified") if not controller else (groups / controller, groups / controllers)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for top in dict.fromkeys(tops):
            for depth in range(len(parts) + 1):
                yield top.joinpath(*parts[:depth])


def _number(file: Path) -> int:
    """The number in a file; 0 where it is missing, or says that there is no limit."""
    text = _text(file)
    return int(text) if text.isdecimal() else 0


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
