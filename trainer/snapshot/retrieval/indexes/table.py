"""All kinds of indexes by name."""

from __future__ import annotations

from trainer.snapshot.retrieval.indexes.flat import FlatIndex
from trainer.snapshot.retrieval.indexes.hnsw import HnswIndex
from trainer.snapshot.retrieval.indexes.ivf import IvfIndex
from trainer.snapshot.retrieval.indexes.kind import IndexKind

INDEXES: dict[str, type[IndexKind]] = {kind.name: kind for kind in (FlatIndex, HnswIndex, IvfIndex)}
