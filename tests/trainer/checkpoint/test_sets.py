"""Runs with several sets of tables are saved, resumed and spread over other ranks as all runs are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launching import train
from tests.helpers.logs import small_log
from tests.trainer.test_ranks import parameters

pytestmark = pytest.mark.slow

# Pipelined, as `full` exchanges the ids of a later batch; each set by rows, and so on both ranks.
SETTINGS: dict[str, Any] = {
    "groups__representation__sets": 3,
    "groups__representation__sharding": ["row_wise"],
    "model__lookup": "full",
    "train__pipeline": "sparse_dist",
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("sets") / "log", seed=1, users=40)


def test_a_run_with_sets_goes_on_bit_for_bit_and_on_another_number_of_ranks(
    log: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "train__max_steps": 8, "checkpoint__every_steps": 4, "checkpoint__keep": 2}
    whole = train(log, tmp_path / "whole", ranks=2, **settings)
    trained = parameters(tmp_path / "whole")
    names = [name for name in trained if "/" in name]
    assert "model.collections.representation.embedding_bags.representation/2/item_id.weight" in names
    assert sum(name.endswith("momentum1") for name in names) == 6
    for ranks, tolerance in ((2, 0.0), (1, 1e-5)):
        run = shutil.copytree(tmp_path / "whole", tmp_path / f"on{ranks}")
        shutil.rmtree(run / "checkpoints" / "step-00000008")
        resumed = train(log, run, ranks=ranks, **settings)
        assert len(resumed) == 8
        assert max(abs(a - b) for a, b in zip(resumed, whole, strict=True)) <= tolerance
        if ranks == 2:
            found = parameters(run)
            assert found.keys() == trained.keys()
            assert all(torch.equal(found[name], trained[name]) for name in found)
