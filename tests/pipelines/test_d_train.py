"""D-Train: one head, clones of it, then each domain's by itself over a backbone that stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pipelines.train
from tests.helpers.launching import ROOT, SETTINGS
from tests.helpers.logs import Row, Shape, random_rows, write_log
from tests.trainer.loop.test_phases import at, lines
from trainer.log.schema import FeatureInfo
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config

MAPS = ["head.towers.*.layers"]
PRE: dict[str, Any] = {"name": "pre", "steps": 4, "heads": "tied"}
POST: dict[str, Any] = {"name": "post", "steps": 3}
FINE: dict[str, Any] = {"name": "fine", "passes": 2, "each": "domain", "train": MAPS, "reset_state": MAPS}
DOMAINS = 3


def rows_of(seed: int, users: int) -> list[Row]:
    """Requests with candidates of several domains."""
    rng, rows = np.random.default_rng(seed), random_rows(seed, Shape(users=users))
    for row in rows:
        counts = row["request_num_candidates"]
        row["candidate_domain_id"] = [rng.integers(0, DOMAINS, count).tolist() for count in counts]
    return rows


def flipped(rows: list[Row], domain: int) -> list[Row]:
    """The same rows with other labels of one domain."""
    return [
        row
        | {
            "label_click": [
                [1 - y if d == domain else y for y, d in zip(*request, strict=True)]
                for request in zip(row["label_click"], row["candidate_domain_id"], strict=True)
            ]
        }
        for row in rows
    ]


def write(path: Path, fine: list[Row]) -> Path:
    """A log whose split `test` is what domains fine-tune on."""
    splits = {"train": rows_of(1, 20), "validation": rows_of(2, 12), "test": fine}
    return write_log(path, splits, more={"domain_id": FeatureInfo(rows=DOMAINS, side="candidate")})


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("d_train") / "log", rows_of(3, 12))


def config(log: Path, *phases: Mapping[str, Any], **changes: Any) -> Config:
    given = {**SETTINGS, "data.log": str(log), "checkpoint.every_steps": 1, "checkpoint.keep": 100}
    given |= {"train.validate_every": 2, "model.experts.hidden": [8], "phases": []}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    base = load_config(
        ROOT / "configs/d_train.toml", [f"{key}={json.dumps(value)}" for key, value in given.items()]
    )
    return Config.model_validate({**base.model_dump(), "phases": list(phases)})


def run(folder: Path, settings: Config) -> Path:
    with process_group() as ranks:
        pipelines.train.run(settings, folder, ranks)
    return folder


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", config(log, PRE, POST, FINE))


def maps(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: each for name, each in tensors.items() if ".towers." in name and ".layers." in name}
    assert found and all(
        each.shape[0] == DOMAINS for name, each in found.items() if name.startswith("model.")
    )
    return found


def last(run_: Path) -> int:
    return max(line["step"] for line in lines(run_))


def test_one_head_then_clones_then_each_domain_by_itself(whole: Path) -> None:
    """Copies are equal to the bit as long as they are tied; a domain's own phase moves its row alone."""
    for step in (1, PRE["steps"]):
        assert all(
            torch.equal(each, each[:1].expand_as(each))
            for each in maps(at(whole, step)).values()
            if each.dim()
        )
    parted = maps(at(whole, PRE["steps"] + 1))
    assert any(
        not torch.equal(each[0], each[1]) for name, each in parted.items() if name.startswith("model.")
    )
    ends = {line["phase"]: line["step"] for line in lines(whole)}
    assert list(ends) == ["pre", "post", *(f"fine_domain{domain}" for domain in range(DOMAINS))]
    before = maps(at(whole, ends["post"]))
    for domain in range(DOMAINS):
        after = maps(at(whole, ends[f"fine_domain{domain}"]))
        for name, each in after.items():
            if name.startswith("model."):
                moved = [not torch.equal(each[other], before[name][other]) for other in range(DOMAINS)]
                assert moved == [other == domain for other in range(DOMAINS)], name
        before = after


def test_what_is_behind_the_heads_keeps_its_bits(whole: Path) -> None:
    """Tables, their state, all other dense weights, their moments and counts."""
    ends = {line["phase"]: line["step"] for line in lines(whole)}
    before, after = at(whole, ends["post"]), at(whole, last(whole))
    others = [name for name in before if not (".towers." in name and ".layers." in name)]
    assert sum("momentum1" in name for name in others) >= 4 and any("exp_avg" in name for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)
