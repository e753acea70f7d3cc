"""All rows, compared one by one: exact."""

from __future__ import annotations

from typing import Any

from trainer.snapshot.retrieval.indexes.kind import IndexKind, Sample


class FlatIndex(IndexKind):
    """`IndexFlatIP`: the vectors as they are."""

    name = "flat"

    def empty(self, sample: Sample) -> Any:
        import faiss

        return faiss.IndexFlatIP(self.width)
