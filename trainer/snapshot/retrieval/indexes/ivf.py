"""Rows in the lists of their nearest centroids, of which a query looks into some."""

from __future__ import annotations

from typing import Any

from trainer.snapshot.retrieval.indexes.kind import IndexKind, Sample, Setting

# FAISS wants 39 vectors of each centroid to train it, and looks at 256 at most.
_LEAST, _TRAINED = 39, 64


class IvfIndex(IndexKind):
    """`IndexIVFFlat` with about 4 sqrt(rows) lists, trained by spherical k-means on a sample."""

    name = "ivf"

    @property
    def lists(self) -> int:
        return max(1, min(int(4 * self.rows**0.5), self.rows // _LEAST))

    @property
    def parameters(self) -> dict[str, int]:
        return {"lists": self.lists, "seed": self.seed}

    @property
    def settings(self) -> list[Setting]:
        probes = [1 << bits for bits in range(0, 11, 2)]
        return [{"nprobe": probe} for probe in probes if probe < self.lists] + [
            {"nprobe": self.lists} for _ in range(self.lists <= probes[-1])
        ]

    def empty(self, sample: Sample) -> Any:
        import faiss

        quantizer = faiss.IndexFlatIP(self.width)
        index = faiss.IndexIVFFlat(quantizer, self.width, self.lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = self.seed
        index.train(sample(_TRAINED * self.lists))
        return index

    def options(self, setting: Setting, chosen: Any = None) -> Any:
        import faiss

        return faiss.SearchParametersIVF(sel=chosen, **setting)  # type: ignore[call-arg]
