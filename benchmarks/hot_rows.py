"""Hot rows in memory in front of a mapped table: look-ups with them and without (hot_rows.md)

    tandemrec bench hot_rows --dir DIR [--rows 16000000 --dim 64 --dtype fp16]

Ids of look-ups follow Zipf's law: the row of rank r is asked for in proportion to r^-s, wherever it lies.
"in memory": the system keeps the whole table. "nothing stays": before every request its pages leave memory,
as those of a table that is far larger than memory do. "reads": pages that a request has to read where the
system keeps as many bytes of the table as --cache says, least recently used first out; counted, not measured,
and the hot rows' bytes are the page cache's where there are no hot rows. Results are compared bit for bit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import tempfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import Seconds, one_thread, rounds, seconds_of
from embeddings.lookup.hot_rows import HotRows
from embeddings.lookup.stored import TORCH_DTYPES, Dtype, StoredTable, sum_bags, to_stored
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.snapshot.matrix_file import map_one

_NAME, _BAND, _PAGE = "table", 1 << 16, mmap.PAGESIZE
_COUNTED = 60
_COLUMNS = {
    "Zipf's s": "{s:.1f}",
    "hot": "{hot:.0%}",
    "in memory, CPU ms": "{memory_plain_cpu_ms:.2f}",
    "with hot rows": "{memory_hot_cpu_ms:.2f}",
    "nothing stays, MB read": "{cold_plain_mb:.1f}",
    "with them": "{cold_hot_mb:.1f}",
    "ms": "{cold_plain_ms:.0f}",
    "ms with them": "{cold_hot_ms:.0f}",
    "to choose anew, CPU s": "{choose_s:.2f}",
    "reads a request": "{reads_plain:,.0f}",
    "reads with them": "{reads_hot:,.0f}",
}


@one_thread()
def main(words: Sequence[str]) -> None:
    options = Options("hot_rows", __doc__).measuring()
    options.add_argument("--rows", type=int, default=16_000_000)
    options.add_argument("--dim", type=int, default=64)
    options.add_argument("--dtype", choices=list(TORCH_DTYPES), default="fp16")
    options.add_argument("--bytes", type=int, default=64 << 20, help="for hot rows")
    options.add_argument("--cache", type=int, default=128 << 20, help="of the page cache that is counted")
    options.add_argument("--lookups", type=int, default=10_000, help="of a request")
    options.add_argument("--dir", type=Path, required=True, help="on a local disk")
    given = options.read(words)
    report = Report(given, "Hot rows", seed=0)
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="bench-") as folder:
        file, shape = _write(given, Path(folder))
        for s in (0.0, 0.8, 1.0, 1.2):
            report.rows.append(_measure(given, file, shape, s))
    size = shape[0] * shape[1] * TORCH_DTYPES[given.dtype].itemsize
    report.line(
        f"{shape[0]:,} rows x {given.dim}, {given.dtype}, {size / 1e6:,.0f} MB; {given.lookups:,} look-ups a "
        f"request; {given.bytes / 1e6:.0f} MB for hot rows; reads with {given.cache / 1e6:.0f} MB of pages"
    )
    report.table(_COLUMNS, report.rows)
    report.close()


def _write(given: Namespace, folder: Path) -> tuple[Path, tuple[int, int]]:
    """A table of random rows as a snapshot has it -> its file, and the shape of what is stored."""
    rng, file = torch.Generator().manual_seed(0), folder / "table.safetensors"
    band = to_stored(torch.randn(_BAND, given.dim, generator=rng), given.dtype)
    with TensorStream(file, {_NAME: (band.dtype, tuple(band.shape[1:]))}, given.rows) as stream:
        for first in range(0, given.rows, _BAND):
            stream.append(_NAME, band.roll(first // _BAND, 0)[: given.rows - first])
    return file, (given.rows, band.shape[1])


class _Requests:
    """Ids by Zipf's law over rows in a random order."""

    def __init__(self, rows: int, lookups: int, s: float) -> None:
        self._rng = np.random.default_rng(0)
        self._bounds = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -s)
        self._order, self._lookups = self._rng.permutation(rows), lookups

    def next(self) -> Tensor:
        drawn = self._rng.random(self._lookups) * self._bounds[-1]
        rank = np.searchsorted(self._bounds, drawn).clip(max=self._order.size - 1)
        return torch.from_numpy(self._order[rank])


def _measure(given: Namespace, file: Path, shape: tuple[int, int], s: float) -> Row:
    dtype: Dtype = given.dtype
    requests = _Requests(given.rows, given.lookups, s)
    plain = map_one(file, _NAME, TORCH_DTYPES[dtype], shape)
    hot = HotRows(plain, given.bytes)
    # Counted before, as by the version that was served before.
    for _ in range(hot._notes.size // given.lookups + 1):
        hot.index_select(requests.next())
    hot.wait()
    hot.keep(hot.noted())
    before = hot.counts
    some = [requests.next() for _ in range(given.repeats + 1)]
    offsets = torch.arange(given.lookups + 1)
    for ids in some:
        assert torch.equal(sum_bags(hot, ids, offsets), sum_bags(plain, ids, offsets))
    share = (hot.counts.hot - before.hot) / (hot.counts.looked_up - before.looked_up)
    row: Row = {"s": s, "hot": share}
    tables: dict[str, StoredTable] = {"plain": plain, "hot": hot}
    for kind, drop in (("memory", False), ("cold", True)):
        read: dict[str, list[float]] = {name: [] for name in tables}
        ways = {
            name: partial(_looked_up, table, iter(some), offsets, plain if drop else None, file, read[name])
            for name, table in tables.items()
        }
        taken = rounds(ways, given.repeats)
        for name, seconds in taken.items():
            row[f"{kind}_{name}_cpu_ms"] = 1e3 * median(each.cpu for each in seconds)
            row[f"{kind}_{name}_ms"] = 1e3 * median(each.wall for each in seconds)
            row[f"{kind}_{name}_mb"] = median(read[name][1:]) / 1e6
    # Most of them are kept already.
    noted = hot.noted()
    row["choose_s"] = seconds_of(lambda: hot.keep(noted)).cpu
    keys = hot._kept.keys.flatten().numpy() if hot._kept is not None else np.zeros(0, dtype=np.int64)
    some = [requests.next() for _ in range(_COUNTED)]
    row_bytes = plain.shape[1] * plain.element_size()
    row["reads_plain"] = _reads(some, keys[:0], row_bytes, given.cache + given.bytes)
    row["reads_hot"] = _reads(some, keys, row_bytes, given.cache)
    return row


def _looked_up(
    table: StoredTable,
    requests: Iterator[Tensor],
    offsets: Tensor,
    drop: Tensor | None,
    file: Path,
    read: list[float],
) -> Seconds:
    """The seconds of the next request; how many bytes of the disk it read goes to `read`."""
    ids = next(requests)
    if drop is not None:
        _drop(drop, file)
    before = _bytes_read()
    seconds = seconds_of(lambda: sum_bags(table, ids, offsets))
    read.append(_bytes_read() - before)
    return seconds


def _drop(mapped: Tensor, file: Path) -> None:
    """Have the pages of a mapped file leave memory."""
    begin = mapped.data_ptr() // _PAGE * _PAGE
    _libc().madvise(begin, mapped.data_ptr() + mapped.nbytes - begin, mmap.MADV_DONTNEED)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _bytes_read() -> int:
    """Bytes that this process had read from a disk (proc(5))."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def _reads(requests: Sequence[Tensor], hot: npt.NDArray[np.int64], row_bytes: int, cache: int) -> float:
    """Pages that a request reads, on average over the second half of some: those that are not in the cache.

    Args:
        hot: rows that are not looked up in the table; cache: bytes of pages, least recently used first out.
    """
    pages: OrderedDict[int, None] = OrderedDict()
    missed, counted = 0, 0
    for number, ids in enumerate(requests):
        cold = ids.numpy()[~np.isin(ids.numpy(), hot)]
        for page in (cold * row_bytes // _PAGE).tolist():
            if page in pages:
                pages.move_to_end(page)
                continue
            missed += number >= len(requests) // 2
            pages[page] = None
            if len(pages) > cache // _PAGE:
                pages.popitem(last=False)
        counted += number >= len(requests) // 2
    return missed / counted
