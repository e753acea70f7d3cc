"""Memory and cores of a machine whose control groups allow less than there is."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer.ranks.machine import (
    cores,
    free_memory_bytes,
    give_pages_back,
    heap_bytes,
    memory_bytes,
    return_freed_memory,
)

GIB = 2**30
PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def groups(root: Path, process: str, **files: str) -> tuple[Path, Path]:
    """A machine's files: `a__b=text` is the file a/b; `process` is what /proc/self/cgroup says."""
    (root / "cgroup").mkdir()
    (root / "process").write_text(process)
    for name, text in files.items():
        file = root / "cgroup" / name.replace("__", "/").replace("_max", ".max")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return root / "process", root / "cgroup"


@pytest.mark.parametrize(
    ("process", "files", "expected"),
    [
        ("0::/job/step\n", {}, PHYSICAL),
        ("0::/job/step\n", {"job__step__memory_max": "max", "job__memory_max": "max"}, PHYSICAL),
        ("0::/job/step\n", {"job__step__memory_max": str(GIB)}, GIB),
        # A group above allows less.
        ("0::/job/step\n", {"job__step__memory_max": str(2 * GIB), "job__memory_max": str(GIB)}, GIB),
        # Another group's limit is nobody else's business.
        ("0::/job/step\n", {"job__other__memory_max": str(GIB)}, PHYSICAL),
        # In a container: the host's name of the group, and its files at the top.
        ("0::/../../kubepods/pod1/c1\n", {"memory_max": str(GIB)}, GIB),
        ("0::/\n", {"memory_max": str(10**18)}, PHYSICAL),
        ("0::/\n", {"memory_max": "nonsense"}, PHYSICAL),
        ("", {"memory_max": str(GIB)}, PHYSICAL),
    ],
)
def test_memory_of_version_2(tmp_path: Path, process: str, files: dict[str, str], expected: int) -> None:
    assert memory_bytes(*groups(tmp_path, process, **files)) == expected


@pytest.mark.parametrize(
    ("place", "limit", "expected"),
    [
        ("memory/docker/c1", GIB, GIB),
        ("memory/docker", GIB, GIB),
        ("memory", GIB, GIB),
        ("memory", 9223372036854771712, PHYSICAL),
        ("cpu/docker/c1", GIB, PHYSICAL),
    ],
)
def test_memory_of_version_1(tmp_path: Path, place: str, limit: int, expected: int) -> None:
    process, root = groups(tmp_path, "12:cpuset:/\n4:memory:/docker/c1\n2:cpu,cpuacct:/docker/c1\n0::/\n")
    (root / place).mkdir(parents=True)
    (root / place / "memory.limit_in_bytes").write_text(f"{limit}\n")
    assert memory_bytes(process, root) == expected


def test_memory_of_both_versions_side_by_side(tmp_path: Path) -> None:
    process, root = groups(tmp_path, "4:memory:/a\n0::/b\n", unified__b__memory_max=str(GIB))
    assert memory_bytes(process, root) == GIB


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ("max 100000", None),
        ("100000 100000", 1),
        ("50000 100000", 1),
        ("90000000 100000", None),
        ("", None),
        ("1 0", None),
    ],
)
def test_cores_of_version_2(tmp_path: Path, share: str, expected: int | None) -> None:
    found = cores(*groups(tmp_path, "0::/job\n", job__cpu_max=share))
    assert found == (expected or len(os.sched_getaffinity(0)))


@pytest.mark.parametrize(("quota", "expected"), [(-1, None), (100_000, 1), (150_000, 1)])
def test_cores_of_version_1(tmp_path: Path, quota: int, expected: int | None) -> None:
    process, root = groups(tmp_path, "2:cpu,cpuacct:/docker/c1\n")
    for name, number in (("quota", quota), ("period", 100_000)):
        file = root / "cpu,cpuacct" / "docker" / f"cpu.cfs_{name}_us"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{number}\n")
    assert cores(process, root) == (expected or len(os.sched_getaffinity(0)))


def test_a_share_of_time_that_is_no_whole_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert (
        cores(*groups(tmp_path, "0::/a/b\n", a__cpu_max="250000 100000", a__b__cpu_max="800000 100000")) == 2
    )


@pytest.mark.parametrize(
    ("process", "files", "expected"),
    [
        ("0::/job\n", {}, 8 * GIB),
        ("0::/job\n", {"job__memory_max": "max", "job__memory.current": str(GIB)}, 8 * GIB),
        ("0::/job\n", {"job__memory_max": str(4 * GIB), "job__memory.current": str(GIB)}, 3 * GIB),
        # What files occupy is given back.
        (
            "0::/job/step\n",
            {
                "job__memory_max": str(4 * GIB),
                "job__memory.current": str(3 * GIB),
                "job__memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2 * GIB,
        ),
        ("0::/job\n", {"job__memory_max": str(GIB), "job__memory.current": str(2 * GIB)}, 0),
        (
            "4:memory:/job\n",
            {
                "memory__job__memory.limit_in_bytes": str(4 * GIB),
                "memory__job__memory.usage_in_bytes": str(3 * GIB),
                "memory__job__memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\n",
            },
            2 * GIB,
        ),
    ],
)
def test_free_memory(tmp_path: Path, process: str, files: dict[str, str], expected: int) -> None:
    machine = tmp_path / "meminfo"
    machine.write_text(f"MemTotal: 9 kB\nMemAvailable:   {8 * GIB // 1024} kB\n")
    assert free_memory_bytes(*groups(tmp_path, process, **files), machine) == expected


def test_free_memory_of_this_machine() -> None:
    assert 0 < free_memory_bytes() < PHYSICAL


def test_pages_of_a_mapped_file_are_given_back(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * (1 << 17))
    mapped = torch.from_file(str(file), size=1 << 25, dtype=torch.uint8)

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    total = int(mapped.sum())
    before = resident()
    give_pages_back(mapped.data_ptr() + 5, mapped.nbytes - 5)
    assert resident() < before - 30_000 and int(mapped.sum()) == total
    # Memory of no file stays what it is.
    own = torch.arange(1 << 20)
    give_pages_back(own.data_ptr(), own.nbytes)
    assert torch.equal(own, torch.arange(1 << 20))


def test_what_lies_free_between_blocks_in_use_is_returned() -> None:
    """Every other of some blocks is let go of: glibc keeps their pages until it is told otherwise."""
    gc.collect()  # What others have left is not let go of meanwhile.
    before = heap_bytes()
    if before is None:
        pytest.skip("no C library that tells of its heaps")
    # Small enough that each lies in the heap, whatever the threshold of mapping is.
    blocks = [torch.ones(12_000) for _ in range(1_000)]
    taken = heap_bytes()
    assert taken is not None and taken.used - before.used >= 1_000 * 48_000
    kept = blocks[::2]
    del blocks
    freed = heap_bytes()
    assert freed is not None and freed.used <= taken.used - 500 * 48_000
    assert freed.free >= taken.free + 500 * 48_000
    resident = own_pages()
    assert return_freed_memory()
    # Of each block of 48,000 bytes at most two pages are shared with its neighbors.
    assert own_pages() <= resident - 500 * 9
    assert all(bool((block == 1).all()) for block in kept)


def own_pages() -> int:
    """Pages of 4,096 bytes of this process that are no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) // 4 for line in lines if line.startswith("RssAnon"))


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert not return_freed_memory() and heap_bytes() is None
