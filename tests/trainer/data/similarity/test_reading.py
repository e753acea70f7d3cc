"""Similarities in batches against a loop over pairs, however steps and blocks are cut and on any rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer.data.similarity.similarity as similarity_module
from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.helpers.similarity import drawn_vectors, shown, slow_similarities, write_parquet
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.data.similarity.encoding import parts_of

ROWS = enrich(random_rows(5, Shape(users=10, behaviors=30)), 6)
LENGTH = 12
CUTS: tuple[dict[str, Any], ...] = (
    {},
    {"requests_per_block": 1, "batch_candidates": 7},
    {"requests_per_block": 5, "behaviors_per_block": 100},
    {"search": {"levels": ["category_id"], "budget": 2}},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("similar")
    write_log(path / "log", {"train": ROWS}, rich=True)
    write_parquet(path / "items.parquet", ITEMS)
    write_parquet(path / "cities.parquet", CITIES, "city")
    write_parquet(path / "users.parquet", USERS, "user_id")
    return path


# Some of the 59 items have no vector, and there are vectors of other items.
ITEMS = drawn_vectors(1, range(5, 70))
CITIES, USERS = drawn_vectors(2, range(1, 6)), drawn_vectors(3, range(8))
OTHERS = {"items": (ITEMS, "item_id"), "cities": (CITIES, "city"), "users": (USERS, "user_id")}


def data_of(folder: Path, similarity: dict[str, Any], **changes: Any) -> DataConfig:
    vectors = {
        name: {"file": str(folder / f"{name}.parquet"), "key": key} for name, (_, key) in OTHERS.items()
    }
    settings = {"log": str(folder / "log"), "history_length": LENGTH, "prefetch": 0, "vectors": vectors}
    return DataConfig.model_validate({**settings, "similarity": {"near": similarity}, **changes})


def read(data: DataConfig, world_size: int = 1, seed: int | None = None) -> dict[Any, Any]:
    features = list(parts_of("near", data.similarity["near"]))
    found = {}
    for rank in range(world_size):
        reader = SequenceLogReader(data, "train", None, rank=rank, world_size=world_size, seed=seed)
        found |= shown((step.batch for step in reader.steps() if step.counted), features)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"statistic": "max"},
        {"statistic": "mean", "step": 0.001, "bases": [2], "combine": "sum"},
        {"statistic": "top", "top": 3, "encoder": "buckets", "step": 0.05},
        {"statistic": "histogram", "tiers": 7},
        {"to": "cities"},
        {"to": "users", "encoder": "buckets"},
        {"to": "users", "statistic": "histogram"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_batches_have_what_a_loop_over_pairs_says(
    folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(folder, {"of": "items", "to": "items", **settings})
    near = data.similarity["near"]
    others, key = OTHERS[near.to]
    known = {item: vector for item, vector in ITEMS.items() if 0 < item < 60}
    expected = slow_similarities(
        ROWS, "near", near, LENGTH, known, others if key != "item_id" else known, key
    )
    assert read(data) == expected
    assert len({str(ids) for ids in expected.values()}) > 5
    for changes in CUTS:
        assert read(data_of(folder, dict(data.model_dump()["similarity"]["near"]), **changes)) == expected
    # A product of fewer pairs at once, on three ranks, in another order.
    monkeypatch.setattr(similarity_module, "_MOST_PAIRS", 24)
    assert read(data, world_size=3, seed=1) == expected


def test_a_batch_has_a_similarity_beside_the_features_that_the_model_reads(folder: Path) -> None:
    data = data_of(folder, {"of": "items", "to": "items", "encoder": "buckets"})
    (step, *_) = SequenceLogReader(data, "train", {"category_id": 9}).steps()
    assert step.batch.features.keys() == ["item_id", "category_id", "near"]
    assert step.batch.sizes is not None and step.batch.sizes.bags == (1, 1, 1)
    assert not step.batch.sizes.one_id
    assert np.unique(step.batch.features["near"].values()).size > 3
