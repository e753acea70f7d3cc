"""A model that a checkpoint is about to fill computes no first weights of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embeddings.lookup import sharding
from embeddings.lookup.shards import local_shards
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import small_log
from trainer.assemble import build_sharded
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config


def test_no_first_rows_where_a_checkpoint_fills_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = small_log(tmp_path / "log", users=8)
    config = load_config(Path("configs/dare.toml"), overrides({**SETTINGS, "data.log": str(log)})[1::2])
    manifest = read_manifest(log)

    def fail(*_: object) -> None:
        raise AssertionError("computed")

    with process_group() as ranks:
        state = torch.get_rng_state()
        first = build_sharded(config, manifest, ranks).model.state_dict()
        assert torch.equal(torch.get_rng_state(), state)
        monkeypatch.setattr(sharding, "initial_rows_", fail)
        none = build_sharded(config, manifest, ranks, first_rows=False).model.state_dict()
    tables = [name for name in none if name.startswith("collections.")]
    assert tables and list(first) == list(none)
    for name in first:
        for one, other in zip(local_shards(first[name]), local_shards(none[name]), strict=True):
            # Pages that nobody has written yet read as zeros.
            same = not other.tensor.any() if name in tables else torch.equal(one.tensor, other.tensor)
            assert same and (name not in tables or one.tensor.all()), name
