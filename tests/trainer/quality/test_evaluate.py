"""Slices of scores by history length: a partition, each measured on its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.logs import IN_PART, Shape, enrich, observed_in_part, random_rows, write_log
from tests.helpers.models import model_of, preset
from trainer.data.reader import SequenceLogReader
from trainer.quality import evaluate, score_files
from trainer.quality.evaluate import scored_split
from trainer.quality.score_files import joined
from trainer.quality.scored import HISTORY_EDGES, Scored
from trainer.ranks.process_group import process_group


def drawn(count: int) -> Scored:
    rng = np.random.default_rng(0)
    request = np.sort(rng.integers(0, count // 5, count))
    history = rng.integers(0, 8, count // 5)[request] ** 4
    score = rng.uniform(0.05, 0.95, (count, 1)).astype(np.float32)
    label = (rng.uniform(size=(count, 1)) < score).astype(np.float32)
    return Scored(score, label, request % 7, request, np.arange(count), np.arange(count), history)


def test_slices_are_a_partition_with_metrics_of_their_own() -> None:
    scored = drawn(2000)
    slices = scored.by_history()
    assert sum(part.samples for part in slices.values()) == 2000 and len(slices) == len(HISTORY_EDGES) - 1
    inside = (scored.history >= 50) & (scored.history < 200)
    assert slices["50 to 199"] == scored.part(inside).metrics()
    assert slices["0"].samples == (scored.history == 0).sum() and "5,000 or more" not in slices
    whole = sum(part.logloss * part.samples for part in slices.values()) / 2000
    assert whole == pytest.approx(scored.metrics().logloss)


def test_edges_may_be_given() -> None:
    slices = drawn(500).by_history((0, 100))
    assert list(slices) == ["0 to 99", "100 or more"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_scores_have_the_weights_of_the_log(
    in_memory: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = observed_in_part(enrich(random_rows(4, Shape(users=6)), 5), 6)
    log = write_log(tmp_path / "log", {"train": rows}, rich=True, **IN_PART)
    config = preset("dare", log)
    model, device = model_of(config), torch.device("cpu")
    reader = SequenceLogReader(config.data, "train", None)
    monkeypatch.setattr(evaluate, "IN_MEMORY", 1 << 20 if in_memory else 0)
    monkeypatch.setattr(score_files, "IN_MEMORY", 1 << 20 if in_memory else 0)
    with process_group(device="cpu"), scored_split(model, reader, device, tmp_path) as scored:
        found = {}
        for chunk in scored.chunks():
            assert chunk.weight is not None
            keys = zip(chunk.user_id, chunk.request_id, chunk.candidate, strict=True)
            found.update(zip(keys, chunk.weight.tolist(), strict=True))
        metrics = scored.all_metrics()
        whole = joined(list(scored.chunks()))
    expected = {}
    for row in rows:
        for r, request in enumerate(row["request_id"]):
            for c, (own, buy) in enumerate(zip(row["weight"][r], row["weight_buy"][r], strict=True)):
                expected[row["user_id"], request, c] = pytest.approx([own, own * buy])
    assert found == expected
    assert whole.weight is not None
    for task, name in enumerate(("click", "buy")):
        seen = ~np.isnan(whole.label[:, task])
        score, label, weight = (each[seen, task] for each in (whole.score, whole.label, whole.weight))
        assert metrics[name].pcoc_weighted == pytest.approx((weight * score).sum() / (weight * label).sum())
