"""What the benchmarks of exposures and of uncertainty draw."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.exposure import config_of
from benchmarks.inputs.bandit import OFFERS, RULES, regrets
from benchmarks.inputs.fatigue import ITEMS, fatigue
from pipelines.ingest.exposure_config import ExposureConfig
from pipelines.ingest.ingest import ingest
from tests.helpers.rawlogs import ids_of_values, rows

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")


def test_the_log_of_users_who_tire_has_the_weights_of_their_true_exposures(tmp_path: Path) -> None:
    raw = fatigue(tmp_path, 1, 40)

    assert raw.exposures.max() > 3
    manifest = ingest(raw.events, tmp_path / "log", config_of({"rate": 4.0}), impressions=raw.impressions)
    assert manifest.report["exposure"]["histogram"]["0"] == (raw.exposures == 0).sum()
    ids, rule = ids_of_values(tmp_path / "log", "item_id"), ExposureConfig(rate=4.0)
    clicks = pq.read_table(raw.impressions)["click"].to_numpy()
    expected = Counter(
        (user, request, ids[item], float(np.float32(1 if click else rule.factor(n))))
        for user, request, item, n, click in zip(
            *(each.tolist() for each in (raw.user, raw.request, raw.item, raw.exposures, clicks)), strict=True
        )
    )
    found = Counter(
        (row["user_id"], request, item, weight)
        for row in rows(tmp_path / "log")
        for request, items, weights in zip(
            row["request_id"], row["candidate_item_id"], row["weight_click"], strict=True
        )
        for item, weight in zip(items, weights, strict=True)
    )
    assert found == expected and raw.item.max() < ITEMS


def test_all_rules_of_the_bandit_lose_to_the_best_item_and_less_than_chance() -> None:
    for offers in OFFERS.values():
        for rule in RULES:
            lost = regrets(rule, 1, 150, offers)
            assert (lost >= 0).all() and 0 < lost.mean() < 0.6
