"""What all steps of the job need, and what they find."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from embeddings.errors import DataError
from pipelines.vectors.options import VectorOptions
from trainer.log.known_values import map_values
from trainer.log.schema import VOCABULARIES, FeatureInfo, LogManifest
from trainer.snapshot import Snapshot
from trainer.snapshot.retrieval.spaces.space import Space


@dataclass
class Job:
    """One call of `tandemrec vectors`.

    Attributes:
        space: of the snapshot; log, manifest: the sequence log and its manifest.
        counts: what was seen, for the manifest; remarks: what could not be done, for the console.
    """

    snapshot: Snapshot
    space: Space
    log: Path
    manifest: LogManifest
    options: VectorOptions
    counts: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        """Of every random draw."""
        return self.snapshot.manifest.config.train.seed if self.options.seed is None else self.options.seed

    def raw_values(self, name: str, info: FeatureInfo, room: Path) -> pa.Array | None:
        """The values that ids stand for, by id from 1; None where the log has none, or none that is readable.

        Args:
            name: of the file in the log's folder of vocabularies; room: where large ones are put.
        """
        if not info.vocabulary:
            return None
        try:
            return map_values(self.log / VOCABULARIES / f"{name}.parquet", info.vocabulary, room, of_log=True)
        except (DataError, OSError) as error:
            self.remarks.append(f"no raw values of {name}: {error}")
            return None
