"""The values that a log's ids stand for, put into a version, so that who serves it needs no log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.log.arrow import PARQUET_ERRORS
from trainer.log.vocabulary import batches_of
from trainer.sealed_folder import entry_of
from trainer.snapshot.manifest import InputFeature, VocabularyFile
from trainer.storage.ranges import parquet_source

# Bytes of all vocabularies of a log, as files; larger ones go along only where they are asked for.
SMALL = 64 << 20


def vocabulary_paths(
    log: Path, inputs: Mapping[str, InputFeature], digests: Mapping[str, str]
) -> dict[str, Path]:
    """Feature -> file of the log, of the features whose values the log's manifest has a digest of."""
    stems = {name: f"context_{name}" if given.side == "context" else name for name, given in inputs.items()}
    return {name: log / "vocab" / f"{stem}.parquet" for name, stem in stems.items() if digests.get(name)}


def copy_vocabularies(part: Path, files: Mapping[str, Path]) -> tuple[VocabularyFile, ...]:
    """Write value and id of each into a draft.

    Raises:
        DataError: one is missing or damaged.
    """
    if files:
        (part / "vocab").mkdir()
    copied = []
    for number, (feature, file) in enumerate(files.items()):
        path = f"vocab/{number}.parquet"
        try:
            with pq.ParquetFile(parquet_source(file), page_checksum_verification=True) as parquet:
                names = [name for name in parquet.schema_arrow.names if name in ("value", "id")]
                schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
                checked = {"compression": "zstd", "write_page_checksum": True}
                with pq.ParquetWriter(part / path, schema, **checked) as writer:
                    for batch in batches_of(parquet, names):
                        writer.write_batch(batch)
        except FileNotFoundError:
            raise DataError("missing; export with --no-vocabularies, or restore the log", file=file) from None
        except PARQUET_ERRORS as error:
            problem = f"unreadable: {error}; export with --no-vocabularies, or restore the log"
            raise DataError(problem, file=file) from None
        copied.append(VocabularyFile(feature=feature, path=path, **entry_of(part / path)))
    return tuple(copied)
