"""Logs with raw ids, and maps of ids that have seen them, without training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from embeddings.ids.bucket_map import Sightings
from embeddings.ids.stage import IdStage
from tests.helpers.logs import Row, Shape, random_rows, write_log
from trainer.log.schema import FeatureInfo
from trainer.run_config import Config

RAW = {"item_id": FeatureInfo(rows=1, raw=True)}


def raw_id(number: int) -> int:
    """Some 64-bit integer for an item; every second one is negative."""
    return (-1) ** number * ((number + 1) * 0x1234567_89ABCDE1 % (1 << 63))


def raw_rows(seed: int, shape: Shape) -> list[Row]:
    """Rows whose items have raw ids."""
    rows = random_rows(seed, shape)
    for row in rows:
        row["history_item_id"] = [raw_id(item) for item in row["history_item_id"]]
        row["candidate_item_id"] = [[raw_id(i) for i in items] for items in row["candidate_item_id"]]
    return rows


def raw_log(path: Path, seed: int = 4, users: int = 8) -> Path:
    """A log with all splits whose `item_id` may be any integer."""
    rows = raw_rows(seed, Shape(users=users))
    return write_log(path, {"train": rows, "validation": rows[: users // 2]}, more=RAW)


def stage_of(config: Config) -> IdStage:
    """Maps that have seen nothing yet."""
    return IdStage(config.id_rules)


def see(stage: IdStage, items: Iterable[int], time: int) -> None:
    """A step of training that sees each of these items once, at one time."""
    ids = np.unique(np.array([raw_id(item) for item in items], dtype=np.int64))
    seen = Sightings(ids, np.ones(ids.size, dtype=np.int64), np.full(ids.size, time))
    stage.take({"item_id": seen}, time)
