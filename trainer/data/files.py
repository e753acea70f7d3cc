"""The files of a split: compared with the manifest before anything is read from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from embeddings.errors import DataError
from trainer.data.row_group import read_footer
from trainer.data.rows import Columns, read_plan, read_rows
from trainer.log.schema import FileInfo, LogManifest
from trainer.ranks.machine import cores
from trainer.sealed_folder import file_digest
from trainer.storage import is_remote
from trainer.storage.objects import sizes

# Files that are looked at together.
_AT_A_TIME = 16
# Threads of `ahead`, and row groups whose results may be in memory at once.
READERS, _AHEAD = 8, 64
Result = TypeVar("Result")


@dataclass(frozen=True)
class RowGroup:
    """Where some rows lie."""

    file: Path
    row_group: int


def ahead(function: Callable[[RowGroup], Result | None], places: Sequence[RowGroup]) -> Iterator[Result]:
    """What a function makes of row groups, in their order, some of them at the same time; without None."""
    with ThreadPoolExecutor(min(READERS, cores()), "ahead") as threads:
        for start in range(0, len(places), _AHEAD):
            for result in threads.map(function, places[start : start + _AHEAD]):
                if result is not None:
                    yield result


def check_files(
    log: Path, manifest: LogManifest, split: str, verify: tuple[int, int] | None, sized: bool = False
) -> list[RowGroup]:
    """All row groups of a split, in stored order.

    Args:
        verify: (rank, world size): every world-size-th file is compared with the manifest's SHA-256 here;
            None compares only row counts.
        sized: compare the sizes of files in a store, which come with their names.

    Raises:
        DataError: the split is unknown or empty, or a file is missing, unreadable or not the one written.
    """
    if split not in manifest.splits:
        raise DataError(f"the log has no split {split!r}; it has {', '.join(manifest.splits)}", file=log)
    files = list(enumerate(manifest.splits[split].files))
    there = _sizes(log / split) if is_remote(log) else {}

    def row_groups(numbered: tuple[int, FileInfo]) -> int:
        number, entry = numbered
        file = log / entry.path
        size = there.get(file.name)
        if is_remote(log) and size is None:
            raise DataError("named in the manifest but missing; ingest again", file=file)
        if sized and size not in (None, entry.bytes):
            problem = (
                f"has {size:,} bytes, the manifest says {entry.bytes:,}; take another copy, or ingest again"
            )
            raise DataError(problem, file=file)
        if verify is not None and number % verify[1] == verify[0]:
            _check_digest(file, entry)
        return _row_groups(file, entry, size)

    # Mostly a wait for the disk or the network, or digests, which leave Python's lock to others.
    with ThreadPoolExecutor(_AT_A_TIME, "check") as pool:
        try:
            counts = list(pool.map(row_groups, files))
        finally:
            # Of a split with a bad file, the other files need no look.
            pool.shutdown(cancel_futures=True)
    places = [
        RowGroup(log / entry.path, group)
        for (_, entry), count in zip(files, counts, strict=True)
        for group in range(count)
    ]
    if not places:
        raise DataError(f"split {split!r} of this log is empty", file=log)
    return places


def _check_digest(file: Path, entry: FileInfo) -> None:
    try:
        digest = file_digest(file)
    except FileNotFoundError:
        raise DataError("named in the manifest but missing; ingest again", file=file) from None
    except OSError as error:
        raise DataError(f"unreadable: {error}", file=file) from None
    if digest != entry.sha256:
        raise DataError(
            "does not match its SHA-256 in the manifest, so it was damaged or replaced; take another "
            "copy, or ingest again (data.verify = false reads it all the same)",
            file=file,
        )


def _sizes(folder: Path) -> dict[str, int]:
    try:
        return sizes(folder)
    except OSError as error:
        raise DataError(f"cannot be listed: {error.strerror or error}", file=folder) from None


def _row_groups(file: Path, entry: FileInfo, size: int | None) -> int:
    """How many there are: as the manifest says of a file of that size, else as its footer says."""
    if entry.row_groups:
        # What is wrong with a file that has no size is told by whoever opens it.
        with suppress(OSError):
            if (file.stat().st_size if size is None else size) == entry.bytes:
                return entry.row_groups
    footer = read_footer(file)
    if footer.num_rows != entry.rows:
        problem = f"holds {footer.num_rows} rows, the manifest says {entry.rows}; ingest again"
        raise DataError(problem, file=file)
    return int(footer.num_row_groups)


def find_bad(
    places: Sequence[RowGroup], columns: Columns, rank: tuple[int, int]
) -> tuple[list[int], list[DataError]]:
    """Try to decode this rank's part of the row groups.

    Returns:
        For each row group 1 where this rank found it bad, and what was wrong with those.
    """
    bad, problems = [0] * len(places), []
    for number in range(rank[0], len(places), rank[1]):
        try:
            read_plan(places[number].file, places[number].row_group)
            read_rows(places[number].file, places[number].row_group, columns)
        except DataError as error:
            bad[number] = 1
            problems.append(error)
    return bad, problems


def without_bad(
    places: Sequence[RowGroup], bad: Sequence[int], largest_share: float, problems: Sequence[DataError]
) -> list[RowGroup]:
    """The good row groups.

    Args:
        bad: as all ranks have found; problems: what was wrong with those that this rank has tried.

    Raises:
        DataError: more than `largest_share` of the row groups are bad.
    """
    if sum(bad) > largest_share * len(places):
        first = next(place for place, flag in zip(places, bad, strict=True) if flag)
        raise DataError(
            f"{sum(bad)} of {len(places)} row groups are bad, data.max_bad allows {largest_share:.2%}; "
            f"{problems[0].problem if problems else 'see the other ranks'}",
            file=first.file,
            row_group=first.row_group,
        )
    return [place for place, flag in zip(places, bad, strict=True) if not flag]
