"""Vectors beside small logs, and similarities of candidates computed one pair after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from tests.helpers.logs import Row
from trainer.config.similarity import SimilarityConfig
from trainer.data.batch import RequestBatch
from trainer.data.similarity.directions import UNITS, directions_of
from trainer.data.similarity.encoding import LEVELS, encoder_of
from trainer.log.encoders.code import codes_of_reals

Vectors = Mapping[int, npt.NDArray[np.float64]]
# (request id, place of the candidate in it) -> feature -> ids.
Shown = dict[tuple[int, int], dict[str, list[int]]]


def drawn_vectors(seed: int, ids: Iterable[int], dim: int = 6) -> dict[int, npt.NDArray[np.float64]]:
    """A vector for each id; of every seventh id, one of zeros."""
    rng = np.random.default_rng(seed)
    return {each: rng.normal(size=dim) * (each % 7 > 0) for each in ids}


def write_parquet(path: Path, vectors: Vectors, key: str = "item_id", **columns: Any) -> Path:
    """A file of vectors; `columns`: in the place of those."""
    kind = pa.list_(pa.float32())
    table = {
        key: pa.array(list(vectors), pa.int64()),
        "vector": pa.array([v.tolist() for v in vectors.values()], kind),
    }
    pq.write_table(pa.table(table | columns), path)
    return path


def slow_cosine(left: npt.NDArray[Any], right: npt.NDArray[Any]) -> int | None:
    """In parts of `UNITS`, by Python's exact integers; None where a vector is zero."""
    a, b = (directions_of(np.float32(side)[None])[0].tolist() for side in (left, right))
    if not (any(a) and any(b)):
        return None
    product = sum(x * y for x, y in zip(a, b, strict=True))
    weights = [math.sqrt(UNITS) / math.sqrt(sum(x * x for x in side)) for side in (a, b)]
    return math.floor(product * weights[0] * weights[1] + 0.5)


def slow_ids(name: str, settings: SimilarityConfig, cosines: list[int]) -> dict[str, list[int]]:
    """Feature -> ids of one candidate."""
    if settings.statistic == "histogram":
        tiers = [min((c + UNITS) * settings.tiers // (2 * UNITS), settings.tiers - 1) for c in cosines]
        ids = [1 + LEVELS * tier + int(math.log2(tiers.count(tier))) for tier in sorted(set(tiers))]
        return {name: ids or [0]}
    most = sorted(cosines, reverse=True)
    chosen = {"max": most[:1], "mean": most, "top": most[: settings.top]}[settings.statistic]
    value = sum(chosen) / (len(chosen) * UNITS) if chosen else math.nan
    encoded = encoder_of(settings).encode(codes_of_reals(np.array([value]), settings.step))
    return {f"{name}{suffix}": bags.values.tolist() for suffix, bags in encoded.items()}


def slow_similarities(
    rows: list[Row], name: str, settings: SimilarityConfig, length: int, of: Vectors, to: Vectors, key: str
) -> Shown:
    """The ids of every candidate of some rows.

    Args:
        key: `item_id` compares with behaviors, any other one with the request's id of it.
    """
    found: Shown = {}
    for row in rows:
        for r, request in enumerate(row["request_id"]):
            end = row["request_history_end"][r]
            if key == "item_id":
                others = row["history_item_id"][max(0, end - length) : end]
            else:
                others = [row["user_id"] if key == "user_id" else row[f"context_{key}"][r]]
            for place, item in enumerate(row["candidate_item_id"][r]):
                pairs = [slow_cosine(of[item], to[o]) for o in others if o in to] if item in of else []
                cosines = [cosine for cosine in pairs if cosine is not None]
                found[request, place] = slow_ids(name, settings, cosines)
    return found


def shown(batches: Iterable[RequestBatch], features: Iterable[str]) -> Shown:
    """What batches have of some features of candidates."""
    found: Shown = {}
    for batch in batches:
        names = batch.request_id[batch.candidate_request].tolist()
        for feature in features:
            parts = batch.features[feature].to_dense()
            assert not any(part.numel() for part in parts[: batch.behaviors])
            place: dict[int, int] = {}
            for name, ids in zip(names, parts[batch.behaviors :], strict=True):
                at = name, place.setdefault(name, 0)
                place[name] += 1
                found.setdefault(at, {})[feature] = ids.tolist()
    return found
