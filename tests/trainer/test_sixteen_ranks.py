"""Sixteen gloo ranks train a tiny model as one rank does: losses of all steps, then every weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.launching import reported
from tests.trainer.test_ranks import parameters_of
from trainer.checkpoint.files import read_state

pytestmark = pytest.mark.slow


def test_sixteen_ranks_equal_one(tmp_path: Path) -> None:
    report = reported("tests.programs.sixteen_ranks", tmp_path)
    one, sixteen = report["1"], report["16"]
    said = "\n".join(path.read_text()[-500:] for path in tmp_path.glob("said-16-*"))
    assert one["codes"] == [0] and sixteen["codes"] == [0] * 16, said
    assert len(one["losses"]) == 4
    # The ranks add up in another order.
    assert np.allclose(one["losses"], sixteen["losses"], atol=1e-5, rtol=0)
    paths = [tmp_path / f"on-{ranks}" / "checkpoints" / "step-00000004" for ranks in (1, 16)]
    plan = read_state(paths[1])["plan"]
    assert plan["world_size"] == 16
    shards = plan["modules"]["collections.attention"]["attention__item_id"]["shards"]
    assert (
        len(shards) == 16
        and sum(shard["sizes"][0] for shard in shards) == plan["tables"]["attention__item_id"][0]
    )
    mine, theirs = (parameters_of(path) for path in paths)
    assert mine.keys() == theirs.keys() and len(mine) > 10
    for name, tensor in mine.items():
        assert torch.allclose(tensor.double(), theirs[name].double(), atol=2e-4), name
