"""Windows as Parquet files in a folder: they appear by a rename, and come in the order of their names.

<stream>/manifest.json                          as that of a log
<stream>/windows/20171201T000000.parquet        user blocks, see docs/online.md
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from stat import S_ISREG

import numpy as np
import pyarrow.parquet as pq

from embeddings.errors import ConfigError, DataError
from trainer.data.row_group import read_footer, read_group
from trainer.data.rows import read_plan
from trainer.data.stream.source import Stamp, Window
from trainer.log.names import path_problem
from trainer.log.schema import FileInfo, SplitInfo
from trainer.sealed_folder import file_digest
from trainer.storage import is_remote

WINDOWS = "windows"
_SUFFIX, _UNFINISHED = ".parquet", (".tmp",)
_TIMES = "request_timestamp"


class WindowFolder:
    """The files of a stream's folder.

    A name that begins with a dot, or ends in `.tmp`, is that of a file somebody still writes. Others that do
    not end in `.parquet` are no windows, and neither are folders.

    Args:
        stream: the folder with the stream's manifest.

    Raises:
        ConfigError: it lies in an object store.
    """

    def __init__(self, stream: Path) -> None:
        if is_remote(stream):
            raise ConfigError(f"{stream}: a stream must be a folder of this machine or of a shared disk")
        self._stream, self.folder = stream, stream / WINDOWS
        self._newest: dict[str, int] = {}

    def listed(self) -> Mapping[str, Stamp]:
        found = {}
        for path in self.folder.iterdir() if self.folder.exists() else ():
            if path.suffix != _SUFFIX or path.name.startswith(".") or path.name.endswith(_UNFINISHED):
                continue
            try:
                facts = path.stat()
            except FileNotFoundError:
                # Somebody has tidied up meanwhile.
                continue
            if S_ISREG(facts.st_mode):
                found[path.stem] = Stamp(facts.st_size, facts.st_mtime_ns)
        return dict(sorted(found.items()))

    def path(self, name: str) -> Path:
        """The file of a window."""
        return self.folder / f"{name}{_SUFFIX}"

    def digest(self, name: str) -> str:
        return file_digest(self.path(name))

    def open(self, name: str, stamp: Stamp) -> Window:
        path = self.path(name)
        if problem := path_problem(f"{WINDOWS}/{path.name}", "the stream's folder"):
            raise DataError(f"has a name that {problem}", file=path)
        digest = file_digest(path)
        if not stamp.bytes:
            raise DataError("is an empty file, not a Parquet file without rows", file=path)
        footer = read_footer(path)
        groups = list(range(footer.num_row_groups))
        plans = [read_plan(path, group, footer) for group in groups]
        behaviors = sum(
            int(read_group(path, group, ["num_behaviors"], footer).ints("num_behaviors").sum())
            for group in groups
        )
        self._newest[name] = newest = _newest(path, footer)
        info = SplitInfo(
            files=_files(path.relative_to(self._stream), footer, stamp, digest),
            rows=footer.num_rows,
            requests=sum(plan.history_end.size for plan in plans),
            candidates=int(sum(plan.candidates.sum() for plan in plans)),
            positives=0,
            behaviors=behaviors,
        )
        return Window(name, stamp, digest, newest, info)

    def newest(self, name: str) -> int:
        if name not in self._newest:
            path = self.path(name)
            try:
                self._newest[name] = _newest(path, read_footer(path))
            except (DataError, OSError):
                return 0
        return self._newest[name]


def _files(path: Path, footer: pq.FileMetaData, stamp: Stamp, digest: str) -> list[FileInfo]:
    if not footer.num_rows:
        return []
    groups = footer.num_row_groups
    return [
        FileInfo(path=str(path), rows=footer.num_rows, bytes=stamp.bytes, sha256=digest, row_groups=groups)
    ]


def _newest(path: Path, footer: pq.FileMetaData) -> int:
    """Unix second of the newest request."""

    def each() -> Iterator[int]:
        for group in range(footer.num_row_groups):
            columns = read_group(path, group, [_TIMES], footer)
            _, times = columns.lists(_TIMES)
            yield int(columns.flat(times, _TIMES, np.int64).max(initial=0))

    return max(each(), default=0)
