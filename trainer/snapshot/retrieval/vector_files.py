"""A folder of vectors: `vectors.parquet`, maybe an index, and a manifest that seals them.

    <out>/vectors.parquet      a row for each item, or for each user and group of items
    <out>/groups.parquet       where items of a group lie, in a space with groups
    <out>/index.<head>.faiss   an index over the rows of vectors.parquet, one for each head
    <out>/manifest.json        `VectorsManifest`; manifest.sha256 holds its digest

It is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from embeddings.errors import DataError
from trainer.config.mistakes import problems_of, words_of
from trainer.config.toml import Settings
from trainer.log.arrow import PARQUET_ERRORS
from trainer.sealed_folder import MANIFEST, Seal, publish, remove_folder, scratch

Floats = npt.NDArray[np.float32]
FORMAT: Final = "tandemrec.vectors"
VECTORS, GROUPS = "vectors.parquet", "groups.parquet"
VECTOR = "vector"
SEAL = Seal(lambda path, problem: DataError(problem, file=path), "write the vectors again")
# Numbers of a row group of Parquet: 32 MB of vectors.
_GROUP_NUMBERS = 8 << 20


class ListedFile(Settings):
    """Size and digest of a file."""

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class MeasuredRecall(Settings):
    """How many of the K rows with the largest inner products an index finds.

    Attributes:
        setting: of the index, such as `nprobe` 16; k: K; queries: that were asked.
        recall: the share that was found, over all queries and heads.
    """

    setting: dict[str, int]
    k: int
    queries: int
    recall: float = Field(ge=0, le=1)


class IndexInfo(Settings):
    """An index over the rows.

    Attributes:
        kind: `flat`, `hnsw` or `ivf`; parameters: how it was built; setting: what its files are set to.
        files: one for each head; recall: measured with several settings.
    """

    kind: str
    parameters: dict[str, int]
    setting: dict[str, int]
    files: list[str]
    recall: list[MeasuredRecall]


class VectorsManifest(Settings):
    """What a folder of vectors holds.

    Attributes:
        of: what a row is; space, branch, task: whose vectors; product: what an inner product is.
        heads: equal slices of a vector, with an inner product each; scale: what these are multiplied by in
            the model, which queries and users hold already.
        rows, width: of the vectors; columns: of vectors.parquet, in order.
        item, group: features that name an item and its group; `group` is empty without groups.
        snapshot, log: SHA-256 of the manifest of either; step: of the snapshot.
        counts: what was seen on the way, see docs/vectors.md; files: all others of the folder.
    """

    format: Literal["tandemrec.vectors"] = FORMAT
    version: Literal[1] = 1
    of: Literal["items", "users"]
    space: str
    branch: str
    task: str = ""
    product: str
    heads: int = Field(ge=1)
    scale: float
    rows: int = Field(ge=0)
    width: int = Field(ge=1)
    columns: list[str]
    item: str = ""
    group: str = ""
    snapshot: str
    step: int
    log: str
    counts: dict[str, int]
    index: IndexInfo | None = None
    files: dict[str, ListedFile]
    versions: dict[str, str] = Field(default_factory=dict)


class VectorWriter:
    """Writes rows with vectors to a Parquet file, a row group of some megabytes at a time.

    Args:
        file: to write; columns: that stand before the vector; width: of it.
    """

    def __init__(self, file: Path, columns: list[pa.Field], width: int) -> None:
        vector = pa.list_(pa.field("element", pa.float32(), nullable=False), width)
        self.schema = pa.schema([*columns, pa.field(VECTOR, vector, nullable=False)])
        self.rows, self._width, self._most = 0, width, max(_GROUP_NUMBERS // width, 1)
        names = [name for name in self.schema.names if name != VECTOR]
        self._writer = pq.ParquetWriter(
            # Random bits of a float have nothing to compress, nor any value twice.
            *(file, self.schema),
            compression={name: "zstd" for name in names} | {f"{VECTOR}.list.element": "none"},
            use_dictionary=names,
            write_page_checksum=True,
        )

    def write(self, columns: list[pa.Array], vectors: Floats) -> None:
        """Rows of `columns`, in their order, with their vectors [n, width]."""
        for begin in range(0, len(vectors), self._most):
            some = np.ascontiguousarray(vectors[begin : begin + self._most], dtype=np.float32)
            values = pa.array(some.reshape(-1))
            vector = pa.FixedSizeListArray.from_arrays(values, type=self.schema.field(VECTOR).type)
            parts = [column.slice(begin, len(some)) for column in columns]
            table = pa.Table.from_arrays([*parts, vector], schema=self.schema)
            self._writer.write_table(table, row_group_size=self._most)
            self.rows += len(some)

    def close(self) -> None:
        self._writer.close()

    def __enter__(self) -> VectorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def vectors_of(file: Path, rows: slice = slice(None)) -> Iterator[tuple[int, Floats]]:
    """The vectors of rows [start, stop) piece by piece, each with its first row; read-only.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            first = 0
            start, stop, _ = rows.indices(parquet.metadata.num_rows)
            for group in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(group).num_rows
                low, high = max(start - first, 0), min(stop - first, size)
                if low < high:
                    column = parquet.read_row_group(group, columns=[VECTOR], use_threads=False).column(0)
                    array = column.combine_chunks()
                    width = array.type.list_size
                    flat = array.flatten().to_numpy(zero_copy_only=True)
                    yield first + low, flat.reshape(-1, width)[low:high]
                first += size
    except PARQUET_ERRORS as error:
        raise DataError(f"unreadable: {error}; write the vectors again", file=file) from error


def read_vectors_manifest(folder: Path, check: bool = False) -> VectorsManifest:
    """What a folder holds; with `check` every file is compared with its digest.

    Raises:
        DataError: there is none, or it is damaged.
    """
    content, file = SEAL.read(folder), folder / MANIFEST
    try:
        raw: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not readable as JSON ({error}); write the vectors again", file=file) from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError("describes no vectors; name a folder that `tandemrec vectors` wrote", file=file)
    try:
        manifest = VectorsManifest.model_validate(raw)
    except ValidationError as error:
        first = problems_of(VectorsManifest, raw)[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"{place or 'manifest'}: {words_of(first, json=True)}; write the vectors again"
        raise DataError(problem, file=file) from error
    for name, entry in manifest.files.items() if check else ():
        SEAL.check(folder / name, entry.bytes, entry.sha256)
    return manifest


@contextmanager
def staged_vectors(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder that becomes `out`, with all its files synced, if the body succeeds; else it vanishes.

    Raises:
        DataError: `out` is there and must not be replaced, or cannot be written.
    """
    try:
        with scratch(out.parent, out.name) as part:
            _check_target(out, overwrite)
            yield part
            _check_target(out, overwrite)
            old = part.with_name(f"{part.name}-old")
            publish(part, out, aside=old if overwrite else None)
            remove_folder(old)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", file=out) from error


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise DataError("is there already; take another folder, or --overwrite it", file=out)
    # No other folder is ever replaced.
    read_vectors_manifest(out)
