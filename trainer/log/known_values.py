"""The values of a vocabulary by id, and ids by value, found exactly; large ones are not held in memory.

A small vocabulary is held in memory. A larger one is written once into files that are mapped: the values in
the order of their ids, and in the order of a hash of 64 bits that hash and the id. Every value that the hash
finds is compared, so that no other value is ever taken for it. The files are kept in a folder named after the
vocabulary's digest, so the next start finds them, whatever log or snapshot it reads.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.errors import UnavailableError
from trainer.log.arrow import PARQUET_ERRORS
from trainer.log.vocabulary import read_values, stream_values, text_of
from trainer.sealed_folder import locked, publish, remove_folder, scratch, voice
from trainer.storage.fetched import drop_old, own_cache
from trainer.storage.ranges import parquet_source
from trainer.storage.sorted_rows import KEY, Rows, append, mapped, sort_rows

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
# Odd, so that no byte of a text is lost; and what spreads a sum over all bits.
_BASE, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_CHUNK_BYTES, _CHUNK_ROWS = 1 << 20, 1 << 16
# Values, and bytes of them, that are held in memory.
_MOST_ROWS, _MOST_BYTES = 1 << 21, 64 << 20
_DIGEST = re.compile("[0-9a-f]{64}")
_FACTS, _VALUES, _OFFSETS, _PLACE = "facts.json", "values", "offsets", "place"


class _Facts(NamedTuple):
    """Of the files of a vocabulary: text or integers, how many, bytes of the longest, line breaks in all."""

    text: bool
    rows: int
    longest: int
    breaks: int


class KnownValues:
    """Value -> id: the first value's id is 1, and 0 is what no value has.

    May be used from several threads.

    Args:
        values: no null among them and none twice; int64 or large_string.
        keys, places: their hashes (integers: themselves), ascending, and where in `values` each is.
        longest: bytes of the longest.
        folder: where the files lie that these are mapped from, if others may find them there.
    """

    def __init__(
        self, values: pa.Array, keys: Hashes | Ints, places: Ints, longest: int, folder: Path | None = None
    ) -> None:
        self.values, self.longest, self.folder = values, longest, folder
        self.text = not pa.types.is_integer(values.type)
        self._keys, self._places = keys, places

    @staticmethod
    def of(values: pa.Array) -> KnownValues:
        """In memory, which takes the values and 16 bytes each."""
        keys = _keys(values)
        order = np.argsort(keys, kind="stable")
        text = not pa.types.is_integer(values.type)
        longest = pc.max(pc.binary_length(values)).as_py() or 0 if text else 8
        return KnownValues(values, keys[order], order, longest)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def kind(self) -> str:
        return "text" if self.text else "integers"

    def ids(self, raw: pa.Array) -> Ints:
        """Ids of values without nulls, of the vocabulary's type; 0 for those that it does not hold."""
        ids: Ints = np.zeros(len(raw), dtype=np.int64)
        if not len(self) or not len(raw):
            return ids
        wanted = _keys(raw)
        at = np.searchsorted(self._keys, wanted)
        left = np.arange(len(raw))
        # Hardly ever do values share a hash; then the one beside is looked at, until the hash is another.
        while left.size:
            here = at[left].clip(max=len(self) - 1)
            same = (at[left] < len(self)) & (self._keys[here] == wanted[left])
            left = left[same]
            places = self._places[here[same]].astype(np.int64)
            equal = pc.equal(raw.take(pa.array(left)), self.values.take(pa.array(places)))
            found = equal.to_numpy(zero_copy_only=False)
            ids[left[found]] = places[found] + 1
            left = left[~found]
            at[left] += 1
        return ids


def known_values(
    file: Path, digest: str, cache: Path | Callable[[], Path] | None = None, *, of_log: bool = False
) -> KnownValues:
    """The values of a vocabulary file.

    Args:
        digest, of_log: see `stream_values`. The file is compared with the digest, unless it is so large that
            it has been written into files of that digest before.
        cache: where these are kept, or what names that once it is needed; None: the user's own caches.

    Raises:
        DataError: the file is missing or damaged, or holds another vocabulary.
        UnavailableError: it cannot be read now, or `cache` not be written.
        ConfigError: it is large, and there is no folder for a cache; see `own_cache`.
    """
    rows, kind = _large(file)
    if not rows or not _DIGEST.fullmatch(digest):
        return KnownValues.of(read_values(file, digest, of_log=of_log))
    # "1" and 1 have the same digest.
    root = cache() if callable(cache) else own_cache(cache)
    folder = root / "vocabularies" / f"{digest}-{rows}-{kind}"
    try:
        found = _opened(folder)
        if found is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Whoever else starts now with the same vocabulary waits for the files.
            with locked(folder.with_name(f"{folder.name}.lock"), "each process writes its own", wait=True):
                found = _opened(folder) or _build(file, digest, folder, rows, of_log)
        # The digest is of lines, so where values hold line breaks, others may have the same one.
        if _facts(folder).breaks and not _same(found.values, stream_values(file, digest, of_log=of_log)):
            with scratch(folder.parent, folder.name) as part:
                # Mapped files stay readable when their folder goes.
                return _fill(file, digest, part, rows, of_log)
        with suppress(OSError):
            # It was used now; see `drop_old`.
            os.utime(folder)
        return found
    except OSError as error:
        problem = f"its {rows:,} values cannot be kept in {folder.parent}: {error.strerror or error}"
        remedy = "make room there, or give `serve` another --cache"
        raise UnavailableError(file, f"{problem}; {remedy}") from None


def drop_unused(used: Iterable[Path | None]) -> None:
    """Delete the files of vocabularies beside those in use that nobody has opened for more than a day.

    Args:
        used: folders of all `KnownValues` in use, so call it once these are opened.
    """
    folders = [folder for folder in used if folder is not None]
    for root in {folder.parent for folder in folders}:
        drop_old(root, {folder.name for folder in folders if folder.parent == root})


def map_values(file: Path, digest: str, folder: Path, *, of_log: bool = False) -> pa.Array:
    """The values of a vocabulary file in the order of their ids; large ones in a local folder, and mapped.

    Raises:
        DataError: as `read_values`. OSError: the folder cannot be written.
    """
    if not _large(file)[0]:
        return read_values(file, digest, of_log=of_log)
    for _ in _written(stream_values(file, digest, of_log=of_log), folder):
        pass
    return _values(folder, _facts(folder))


def values_of(file: Path, digest: str, ids: Ints, *, of_log: bool = False) -> dict[int, int | str]:
    """id -> value of some ids, ascending and each once; those that the vocabulary does not have are left out.

    Raises:
        DataError: as `stream_values`.
    """
    found: dict[int, int | str] = {}
    first = 1
    for values in stream_values(file, digest, of_log=of_log):
        here = ids[slice(*np.searchsorted(ids, [first, first + len(values)]).tolist())]
        chosen = values.take(pa.array(here - first))
        found.update(zip(here.tolist(), chosen.to_pylist(), strict=True))
        first += len(values)
    return found


def _large(file: Path) -> tuple[int, str]:
    """-> (the number of values, where they are too many for memory, and 0 where not or where nobody can tell;
    the type that the file has them in).
    """
    try:
        with pq.ParquetFile(parquet_source(file)) as parquet:
            footer, size = parquet.metadata, 0
            integers = pa.types.is_integer(parquet.schema_arrow.field("value").type)
            for number in range(footer.num_row_groups):
                columns = footer.row_group(number)
                size += sum(
                    columns.column(at).total_uncompressed_size
                    for at in range(columns.num_columns)
                    if columns.column(at).path_in_schema == "value"
                )
            large = footer.num_rows > _MOST_ROWS or size > _MOST_BYTES
            return footer.num_rows if large else 0, "integers" if integers else "text"
    except (*PARQUET_ERRORS, KeyError):
        # Whoever reads it says what is wrong.
        return 0, ""


def _build(file: Path, digest: str, folder: Path, rows: int, of_log: bool) -> KnownValues:
    voice.say(f"{file}: writing its {rows:,} values once into {folder}, where they are mapped")
    with scratch(folder.parent, folder.name) as part:
        _fill(file, digest, part, rows, of_log)
        remove_folder(folder, strict=True)
        publish(part, folder)
    made = _opened(folder)
    assert made is not None
    return made


def _fill(file: Path, digest: str, part: Path, rows: int, of_log: bool) -> KnownValues:
    """Write the files of a vocabulary into an empty folder."""
    of_place = np.dtype(np.uint32 if rows < 1 << 32 else np.int64)
    kinds: dict[str, npt.DTypeLike] = {KEY: np.uint64, _PLACE: of_place}
    pieces = _written(stream_values(file, digest, of_log=of_log), part)
    first = next(pieces)
    if pa.types.is_integer(first.type):
        kinds[KEY] = np.int64
    found = sort_rows(_keyed(pieces), kinds, lambda: part)
    for name, values in found.items():
        # A few values of much text are in memory still.
        if not (part / name).is_file():
            (part / name).write_bytes(values.tobytes())
    made = _opened(part)
    assert made is not None
    made.folder = None
    return made


def _same(known: pa.Array, pieces: Iterator[pa.Array]) -> bool:
    """Whether pieces, put together, are the values that are known."""
    first = 0
    for values in pieces:
        if not values.equals(known.slice(first, len(values))):
            return False
        first += len(values)
    return first == len(known)


def _opened(folder: Path) -> KnownValues | None:
    """What was written there; None where it was not, or some of it is gone."""
    try:
        facts = _facts(folder)
        sizes = [(folder / name).stat().st_size for name in (KEY, _PLACE)]
        wide = 4 if facts.rows < 1 << 32 else 8
        if sizes != [8 * facts.rows, wide * facts.rows]:
            return None
        keys = mapped(folder / KEY, np.uint64 if facts.text else np.int64)
        places = mapped(folder / _PLACE, np.uint32 if wide == 4 else np.int64)
        return KnownValues(_values(folder, facts), keys, places, facts.longest, folder)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _facts(folder: Path) -> _Facts:
    return _Facts(**json.loads((folder / _FACTS).read_text(encoding="utf-8")))


def _values(folder: Path, facts: _Facts) -> pa.Array:
    """Raises ValueError where the files have not as many as the facts say."""
    content = mapped(folder / _VALUES, np.uint8)
    if not facts.text:
        if content.size != 8 * facts.rows:
            raise ValueError(folder)
        return pa.Array.from_buffers(pa.int64(), facts.rows, [None, pa.py_buffer(content)])
    offsets = mapped(folder / _OFFSETS, np.int64)
    if offsets.size != facts.rows + 1 or int(offsets[-1]) != content.size:
        raise ValueError(folder)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_string(), facts.rows, buffers)


def _written(pieces: Iterator[pa.Array], folder: Path) -> Iterator[pa.Array]:
    """The same pieces, the first without values, once they are in the files of a folder."""
    rows = size = longest = breaks = 0
    with ExitStack() as opened:
        content, offsets = (opened.enter_context((folder / n).open("wb")) for n in (_VALUES, _OFFSETS))
        append(offsets, np.zeros(1, dtype=np.int64))
        text = False
        for values in pieces:
            text = not pa.types.is_integer(values.type)
            if not text:
                append(content, values.to_numpy())
            elif len(values):
                bounds, data = text_of(values)
                letters = np.frombuffer(data, dtype=np.uint8)
                append(content, letters)
                breaks += int(np.count_nonzero(letters == ord("\n")))
                append(offsets, bounds[1:] + size)
                size, longest = size + len(data), max(longest, int(np.diff(bounds).max()))
            rows += len(values)
            yield values
    facts = _Facts(text, rows, longest if text else 8, breaks)
    (folder / _FACTS).write_text(json.dumps(facts._asdict()), encoding="utf-8")


def _keyed(pieces: Iterator[pa.Array]) -> Iterator[Rows]:
    first = 0
    for values in pieces:
        yield {KEY: _keys(values), _PLACE: np.arange(first, first + len(values))}
        first += len(values)


def _keys(values: pa.Array) -> Hashes | Ints:
    """What values are found by: integers by themselves, text by a hash."""
    keys: Hashes | Ints = values.to_numpy() if pa.types.is_integer(values.type) else _hashes(values)
    return keys


def _hashes(values: pa.Array) -> Hashes:
    """A hash of 64 bits for every text of a large_string array without nulls."""
    if not len(values):
        return np.zeros(0, dtype=np.uint64)
    offsets, data = text_of(values)
    content = np.frombuffer(data, dtype=np.uint8)
    hashes = np.empty(len(values), dtype=np.uint64)
    start = 0
    while start < len(values):
        # Some megabytes at a time: every byte takes 24 of them while it is summed up.
        most = int(np.searchsorted(offsets, offsets[start] + _CHUNK_BYTES, side="right")) - 1
        stop = min(max(most, start + 1), start + _CHUNK_ROWS, len(values))
        bounds = offsets[start : stop + 1]
        hashes[start:stop] = _hash(content[bounds[0] : bounds[-1]], bounds - bounds[0])
        start = stop
    return hashes


def _hash(content: npt.NDArray[np.uint8], offsets: Ints) -> Hashes:
    """The sum of every byte times a power of its place, modulo 2^64."""
    lengths = np.diff(offsets)
    longest = int(lengths.max())
    powers = np.multiply.accumulate(np.full(longest + 1, _BASE, dtype=np.uint64))
    place = np.arange(content.size) - np.repeat(offsets[:-1], lengths)
    sums = np.zeros(content.size + 1, dtype=np.uint64)
    np.cumsum((content.astype(np.uint64) + np.uint64(1)) * powers[place], out=sums[1:])
    hashes: Hashes = (sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64)) * _SPREAD
    return hashes
