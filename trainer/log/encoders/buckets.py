"""A number becomes one id: that of the interval in which it lies."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from trainer.log.bags import Bags, Ints
from trainer.log.encoders.code import number_of
from trainer.log.encoders.encoder import Encoder, Number


class Buckets(Encoder):
    """Intervals of numbers: id 0 is missing, 1 lies below the first edge, and each edge begins another."""

    kind: Literal["buckets"]
    edges: tuple[Number, ...] | None = None
    """The borders of the buckets, ascending, in the unit of the column."""
    count: int = Field(0, ge=0, le=1_000_000)
    """Instead of `edges`: so many buckets, each with about as many of the numbers of the train split. Ingest
    computes their edges, and the log keeps these."""

    @model_validator(mode="after")
    def _has_edges_or_a_count(self) -> Self:
        if (self.edges is None) == (self.count == 0):
            raise ValueError("buckets need either `edges` or `count`")
        if any(low >= high for low, high in pairwise(map(self.quantise, self.edges or ()))):
            raise ValueError(f"edges must ascend, also when counted in steps of {self.step}")
        return self

    def parts(self, name: str) -> dict[str, int]:
        return {name: 2 + (self.count - 1 if self.edges is None else len(self.edges))}

    def most_ids(self, name: str) -> dict[str, int]:
        return {name: 1}

    def meanings(self, name: str) -> dict[str, str]:
        edges = " ".join(str(self.quantise(edge)) for edge in self.edges or ())
        return {name: f"buckets from {edges}, {self.unit}"}

    def encode(self, codes: Ints) -> dict[str, Bags]:
        # What is beyond 64 bits has the greatest or the least integer, and so the last or the first bucket.
        value, missing, _ = number_of(codes)
        edges = np.array([self.quantise(edge) for edge in self.edges or ()], dtype=np.int64)
        ids = 1 + np.searchsorted(edges, value, side="right")
        return {"": Bags(np.where(missing, 0, ids).astype(np.int32))}
