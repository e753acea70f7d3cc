"""A graph of near rows, which a query walks (Malkov and Yashunin, 2016)."""

from __future__ import annotations

from typing import Any

from trainer.snapshot.retrieval.indexes.kind import IndexKind, Sample, Setting

_LINKS, _BUILDING = 32, 100


class HnswIndex(IndexKind):
    """`IndexHNSWFlat` by inner product; several threads build another graph each time."""

    name = "hnsw"
    repeatable = False

    @property
    def parameters(self) -> dict[str, int]:
        return {"links": _LINKS, "efConstruction": _BUILDING}

    @property
    def settings(self) -> list[Setting]:
        return [{"efSearch": 1 << bits} for bits in range(4, 11, 2)]

    def empty(self, sample: Sample) -> Any:
        import faiss

        index = faiss.IndexHNSWFlat(self.width, _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _BUILDING
        return index

    def options(self, setting: Setting, chosen: Any = None) -> Any:
        import faiss

        return faiss.SearchParametersHNSW(sel=chosen, **setting)  # type: ignore[attr-defined]

    def apply(self, index: Any, setting: Setting) -> None:
        super().apply(index.hnsw, setting)
