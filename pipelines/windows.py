"""`tandemrec windows`: cut a sequence log by the time of its requests into the windows of a stream.

A stream is a folder that grows, see docs/online.md:

    <stream>/manifest.json, manifest.sha256   as those of a log, without files
    <stream>/vocab/                            as that of the log
    <stream>/windows/20171201T000000.parquet   user blocks of the requests of one span of time

What lies before the first window may become a sequence log of its own.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import ConfigError
from trainer.data.files import check_files
from trainer.data.row_group import read_footer, read_group
from trainer.log.cut import Pieces, by_time, cut
from trainer.log.schema import VOCABULARIES, LogManifest, read_manifest, schema_of
from trainer.log.writer import check_target, staged, write_manifest, write_split
from trainer.sealed_folder import remove_folder, sync
from trainer.storage import is_remote
from trainer.storage.objects import copy_folder

WINDOWS = "windows"
"""The folder of a stream's windows."""
_PENDING = ".pending"
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
# Cut rows are written once there are so many behaviors of them.
_BUFFER = 16 << 20


@dataclass(frozen=True)
class WindowOptions:
    """How a log is cut.

    Attributes:
        every: seconds of a window.
        first: unix second at which the first window begins; None: that of the oldest request, rounded down to
            a multiple of `every`.
        splits: of the log.
        max_history: the newest behaviors that each request keeps at least; 0: all.
        pace: seconds from one window's appearance to that of the next.
    """

    every: int
    first: int | None = None
    splits: Sequence[str] = ("train", "validation", "test")
    max_history: int = 0
    pace: float = 0.0


def windows(
    log: Path, out: Path, options: WindowOptions, before: Path | None = None, overwrite: bool = False
) -> LogManifest:
    """Write the stream `out`, and at `before` a log of the requests that lie before the first window.

    A window appears whole. One without requests is left out. Rows of a window are in the order of their first
    requests; those of one user that stood together in one row of the log share a history.

    Returns:
        The stream's manifest.

    Raises:
        ConfigError: the log has none of the splits, or no request from `options.first` on.
        DataError: the log is damaged, or `out` or `before` must not be replaced.
    """
    manifest = read_manifest(log)
    splits = _splits_of(manifest, options)
    if options.max_history and manifest.clusters:
        raise ConfigError("--max-history: clusters stand for parts of whole histories, which must stay whole")
    if is_remote(out):
        raise ConfigError(f"--out {out}: must be a folder of this machine, since windows appear by a rename")
    for target in (out, before):
        if target is not None:
            check_target(target, overwrite)
    cutter = _Cutter(log, manifest, options, splits)
    counts = cutter.count()
    numbers = sorted(number for number in counts if number >= 0)
    if not numbers:
        raise ConfigError("no request of the log lies in a window; choose an earlier time with --from")
    if before is not None and cutter.earlier:
        with staged(before, overwrite) as root:
            _write_earlier(cutter, root)
    stream = cutter.stream_manifest()
    with staged(out, overwrite) as root:
        folder = root / (_PENDING if options.pace else WINDOWS)
        folder.mkdir()
        (root / WINDOWS).mkdir(exist_ok=True)
        _write_windows(cutter, root, folder)
        copy_folder(log / VOCABULARIES, root / VOCABULARIES)
        write_manifest(root, stream)
    print("\n".join(_told(cutter, counts, out, before)), flush=True)
    if options.pace:
        _let_appear(out, options.pace)
    return stream


def seconds_of(text: str, option: str) -> int:
    """Seconds of `1d`, `6h`, `30m` or `90s`. Raises ConfigError naming the option."""
    found = re.fullmatch(r"([1-9][0-9]*)([smhd])", text.strip())
    if found is None:
        raise ConfigError(f"{option} {text}: is no length of time; say 1d, 6h, 30m or 90s")
    return int(found[1]) * _UNITS[found[2]]


def second_of(text: str, option: str) -> int:
    """The unix second of a day or time such as 2017-12-01 or 2017-12-01T06:00, in UTC unless it says else."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text}: is no time; say 2017-12-01 or 2017-12-01T06:00") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def window_name(begin: int) -> str:
    """The file of a window that begins at a unix second; later ones sort behind it."""
    return f"{datetime.fromtimestamp(begin, UTC):%Y%m%dT%H%M%S}.parquet"


class _Cutter:
    """A log's rows, cut; window -1 is all that lies before the first one."""

    def __init__(
        self, log: Path, manifest: LogManifest, options: WindowOptions, splits: Sequence[str]
    ) -> None:
        self.log, self.manifest, self.options = log, manifest, options
        self.schema = schema_of(manifest)
        self.groups = [
            (split, place.file, place.row_group)
            for split in splits
            for place in check_files(log, manifest, split, verify=(0, 1))
        ]
        self.first = self._oldest() if options.first is None else options.first
        self.earlier: dict[str, int] = {}

    @property
    def rows_per_group(self) -> int:
        """As the log has them."""
        _, file, _ = self.groups[0]
        return int(read_footer(file).row_group(0).num_rows)

    def _times(self) -> Iterator[tuple[str, npt.NDArray[np.int64]]]:
        for split, file, group in self.groups:
            _, times = read_group(file, group, ["request_timestamp"], None).lists("request_timestamp")
            yield split, times.to_numpy()

    def _oldest(self) -> int:
        oldest = min(int(times.min()) for _, times in self._times() if times.size)
        return oldest // self.options.every * self.options.every

    def span_of(self, times: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The window of each request."""
        return np.maximum((times - self.first) // self.options.every, -1)

    def count(self) -> Mapping[int, int]:
        """The requests of each window; notes those before the first one by their splits."""
        counts: Counter[int] = Counter()
        for split, times in self._times():
            spans, sizes = np.unique(self.span_of(times), return_counts=True)
            counts.update(dict(zip(spans.tolist(), sizes.tolist(), strict=True)))
            if spans.size and spans[0] < 0:
                self.earlier[split] = self.earlier.get(split, 0) + int(sizes[0])
        return counts

    def rows(self, wanted: str = "", earlier: bool = False) -> Iterator[tuple[pa.Table, Pieces]]:
        """Cut rows of each row group, of one split only if it is named; `earlier`: those of window -1."""
        for split, file, group in self.groups:
            if wanted not in ("", split):
                continue
            table = read_group(file, group, self.schema.names, None).table
            pieces = Pieces.of(table, self.span_of)
            pieces = pieces.chosen((pieces.span < 0) == earlier)
            yield cut(table, pieces, self.options.max_history).cast(self.schema), pieces

    def stream_manifest(self) -> LogManifest:
        """What the manifest of the stream says."""
        facts = {
            "every_seconds": self.options.every,
            "first": self.first,
            "splits": list(dict.fromkeys(split for split, _, _ in self.groups)),
            "max_history": self.options.max_history,
        }
        made = {**self.manifest.ingest, "windows": facts}
        return self.manifest.model_copy(update={"splits": {}, "report": {}, "ingest": made})


def _splits_of(manifest: LogManifest, options: WindowOptions) -> list[str]:
    for split in options.splits:
        if split not in manifest.splits:
            there = ", ".join(manifest.splits)
            raise ConfigError(f"--splits {split}: no such split of the log; it has {there}")
    splits = [split for split in options.splits if manifest.holds(split)]
    if not splits:
        raise ConfigError("none of the splits has a request; name others with --splits")
    return splits


def _write_windows(cutter: _Cutter, root: Path, folder: Path) -> None:
    """All windows. Cut rows wait in files by window, so that one window at a time is in memory."""
    spill = root / "spill"
    waiting: list[tuple[pa.Table, npt.NDArray[np.int64]]] = []
    behaviors = turns = 0
    for table, pieces in cutter.rows():
        waiting.append((table, pieces.span))
        behaviors += int(np.sum(table["num_behaviors"].to_numpy()))
        if behaviors >= _BUFFER:
            _spill(waiting, spill, turns)
            waiting, behaviors, turns = [], 0, turns + 1
    _spill(waiting, spill, turns)
    for part in sorted(spill.iterdir(), key=lambda path: int(path.name)):
        pieces_of_it = [pq.read_table(file) for file in sorted(part.iterdir())]
        rows = by_time(pa.concat_tables(pieces_of_it).combine_chunks()).cast(cutter.schema)
        begin = cutter.first + int(part.name) * cutter.options.every
        file = folder / window_name(begin)
        with pq.ParquetWriter(file, cutter.schema, compression="zstd", write_page_checksum=True) as writer:
            writer.write_table(rows, row_group_size=cutter.rows_per_group)
    remove_folder(spill, strict=True)


def _spill(waiting: Sequence[tuple[pa.Table, npt.NDArray[np.int64]]], spill: Path, turn: int) -> None:
    """Write `<spill>/<window>/<turn>.parquet`."""
    if not waiting:
        return
    table = pa.concat_tables([table for table, _ in waiting])
    spans = np.concatenate([span for _, span in waiting])
    order = np.argsort(spans, kind="stable")
    numbers, first = np.unique(spans[order], return_index=True)
    for number, rows in zip(numbers.tolist(), np.split(order, first[1:]), strict=True):
        part = spill / str(number)
        part.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.take(pa.array(rows)), part / f"{turn:06d}.parquet", compression="zstd")


def _write_earlier(cutter: _Cutter, root: Path) -> None:
    """A log of what lies before the first window, in the splits that it has."""
    manifest, size = cutter.manifest, cutter.rows_per_group
    infos = {}
    for split, info in manifest.splits.items():
        batches = (batch for table, _ in cutter.rows(split, earlier=True) for batch in table.to_batches())
        per_file = max([size, *(file.rows // size * size for file in info.files[:1])])
        infos[split] = write_split(batches, root, split, cutter.schema, (size, per_file))
    copy_folder(cutter.log / VOCABULARIES, root / VOCABULARIES)
    made = {**manifest.ingest, "before": cutter.first}
    write_manifest(root, manifest.model_copy(update={"splits": infos, "report": {}, "ingest": made}))


def _let_appear(stream: Path, pace: float) -> None:
    """Give the windows their places one after the other."""
    pending = stream / _PENDING
    for number, file in enumerate(sorted(pending.iterdir())):
        if number:
            time.sleep(pace)
        file.touch()  # so that it is as old as it seems
        file.rename(stream / WINDOWS / file.name)
        sync(stream / WINDOWS)
        print(f"{file.name} is there", flush=True)
    pending.rmdir()


def _told(cutter: _Cutter, counts: Mapping[int, int], out: Path, before: Path | None) -> list[str]:
    full = sorted(number for number in counts if number >= 0)
    every = cutter.options.every
    first, last = (window_name(cutter.first + number * every) for number in (full[0], full[-1]))
    requests = sum(counts[number] for number in full)
    lines = [f"{len(full):,} windows, {first} to {last}, {requests:,} requests -> {out / WINDOWS}"]
    if empty := full[-1] - full[0] + 1 - len(full):
        lines.append(f"{empty:,} spans of time between them have no request, so they have no window")
    if cutter.earlier:
        told = ", ".join(f"{split} {count:,}" for split, count in cutter.earlier.items())
        where = f"-> {before}" if before is not None else "are left out; --before LOG keeps them"
        lines.append(f"requests before the first window ({told}) {where}")
    elif before is not None:
        lines.append(f"no request lies before the first window, so there is no {before}")
    return lines
