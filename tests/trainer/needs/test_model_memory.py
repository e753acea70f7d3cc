"""Settings that would take more memory than there is are refused before any of it is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.errors import ConfigError
from tests.helpers.logs import small_log
from trainer.assemble import build_sharded, build_trainable, cluster_of
from trainer.log.schema import read_manifest
from trainer.needs.model_memory import check_step
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import load_config
from trainer.step_size import StepSize

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("memory") / "log", seed=1)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


def build(preset: str, log: Path, ranks: Ranks, **settings: Any) -> None:
    words = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in settings.items()]
    config = load_config(CONFIGS / f"{preset}.toml", [f"data.log={log}", *words])
    build_sharded(config, read_manifest(log), ranks, training=True)


@pytest.mark.parametrize(
    ("preset", "settings", "problem"),
    [
        (
            "dare",
            {"model__hidden": [65_536] * 40},
            r"largest tensor is head.*\[65536, 65536\], 17.18 GB: make model.h",
        ),
        (
            "multi_embedding",
            {"model__experts__hidden": [65_536] * 20},
            r"largest tensor is head.*\[\d, 65536, 65536\], .*: make model.experts.hidden",
        ),
        (
            "stem",
            {"model__mixer__hidden": [65_536] * 30},
            r"largest tensor is head.*: make model.mixer.hidden",
        ),
        (
            "tdpe",
            {"data__history_length": 1_000_000, "model__time_dim": 65_536, "model__time_tables": "stage"},
            r"largest tensor is .*1000001.*: make data.history_length, model.time_dim smaller",
        ),
        (
            "sdim",
            {"model__hash_bits": 12, "data__batch_candidates": 10**7},
            r"model.hashes = 16 with hash_bits = 12 takes .* GB for the .* requests of \d+ behaviors",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_named(
    log: Path, ranks: Ranks, preset: str, settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        build(preset, log, ranks, **settings)


def test_the_limit_of_collisions_is_half_of_a_ranks_memory() -> None:
    config = load_config(CONFIGS / "sdim.toml", ["data.history_length=100", "model.hash_bits=3"])
    size = StepSize(behaviors=2000, candidates=100, requests=50, blocks=((80, 4), (300, 9)), source="here")
    # 128 buckets, windows of 100, and 25 or 50 requests on a rank.
    need = 128 * 100 * 25 * 4
    check_step(config, size, 2, 2 * need)
    with pytest.raises(ConfigError, match="the 25 requests of 100 behaviors"):
        check_step(config, size, 2, 2 * need - 1)
    with pytest.raises(ConfigError, match="the 50 requests of 100 behaviors"):
        check_step(config, size, 1, 2 * need)
    check_step(load_config(CONFIGS / "dare.toml"), size, 1, 1)


def test_a_container_has_what_its_control_group_allows(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = 10**6
    for module in ("assemble", "needs.model_memory"):
        monkeypatch.setattr(f"trainer.{module}.memory_bytes", lambda: allowed)
    found = cluster_of(Ranks(0, 4, 2, torch.device("cpu")))
    assert found.memory == allowed // 2
    config = load_config(CONFIGS / "dare.toml", [f"data.log={log}", "model.hidden=[1024]"])
    with pytest.raises(ConfigError, match=r"the dense part .* this machine has 0\.0 GB"):
        build_trainable(config, read_manifest(log), torch.device("meta"))
