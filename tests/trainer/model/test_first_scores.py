"""Before anything is learned, a behavior of the candidate's own ids scores higher than others do.

A softmax over hundreds of scores that are all alike tells nothing, and passes next to no gradient to the
vectors that are scored: a model that begins so learns slowly (docs/training.md).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.launching import ROOT
from tests.helpers.models import SMALL, model_of, small_log
from tests.helpers.presets import renamed
from trainer.model.frame import TwoStageModel
from trainer.model.retrieve.dot import SoftSearch
from trainer.model.retrieve.score import AttentionVectors, DotScorer
from trainer.run_config import Config, load_config

# How far the score of equal ids lies above that of others: e ** 0.25 times their weight in a softmax.
LEAST = 0.25
PRESETS = ["dare", "twin", "tin", "sim_soft", "eta", "twin_3e", "twin_4e", "twin_proj", "stacked_tin"]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("first") / "log")


def config_of(name: str, log: Path, *overrides: str) -> Config:
    path = ROOT / f"configs/{name}.toml"
    return load_config(path, [f"data.log={log}", *SMALL, *renamed(name, log), *overrides])


def first_vectors(model: TwoStageModel, group: str) -> Tensor:
    """Vectors of items 1, 2, ... and some category each, before anything is learned: [R, D]."""
    tables = [weight for name, weight in model.collections.named_parameters() if name.startswith(f"{group}.")]
    ids = torch.arange(1, max(weight.shape[0] for weight in tables))
    return torch.cat([weight[ids % weight.shape[0]].detach() for weight in tables], dim=1)


def lead_of_equal_ids(scorer: DotScorer, query: Tensor, key: Tensor) -> Tensor:
    """The mean score of equal ids less that of others, of each head: [H]."""
    raw = AttentionVectors(query, key, torch.zeros(len(query), dtype=torch.int64))
    with torch.no_grad():
        encoded = scorer.encode(raw)
        parts = (part.unflatten(1, (scorer.heads, -1)) for part in (encoded.query_CD, encoded.key_ND))
        score_HCN = torch.einsum("chd,nhd->hcn", *parts)
    equal = score_HCN.diagonal(dim1=1, dim2=2).mean(1)
    others = (score_HCN.sum((1, 2)) - equal * len(query)) / (len(query) * (len(query) - 1))
    return equal - others


@pytest.mark.parametrize("name", PRESETS)
def test_equal_ids_score_highest_at_first(name: str, log: Path) -> None:
    config = config_of(name, log)
    model, roles = model_of(config), config.model.roles
    branch = model.branches.named()["main"]
    vectors = (first_vectors(model, group) for group in (roles.attention_target, roles.attention_behavior))
    query, key = (branch._attended(each) for each in vectors)
    scorers = [branch.scorer, *([branch.search.index] if isinstance(branch.search, SoftSearch) else [])]
    for scorer in scorers:
        assert isinstance(scorer, DotScorer)
        assert lead_of_equal_ids(scorer, query, key).min() > LEAST


def test_unrelated_vectors_of_the_two_sides_and_small_ones_do_not(log: Path) -> None:
    """What the presets were before: the test above fails for them."""
    for name, override in (("twin_4e", "groups.key.init_like="), ("tin", "groups.shared.init=uniform")):
        model = model_of(config := config_of(name, log, override))
        roles, branch = config.model.roles, model.branches.named()["main"]
        query, key = (
            first_vectors(model, each) for each in (roles.attention_target, roles.attention_behavior)
        )
        assert isinstance(branch.scorer, DotScorer)
        assert lead_of_equal_ids(branch.scorer, query, key).abs().max() < LEAST / 3


def test_products_are_divided_by_the_temperature(log: Path) -> None:
    found = []
    for temperature in (1.0, 0.5):
        model = model_of(config_of("dare", log, f"model.temperature={temperature}"))
        branch, vectors = model.branches.named()["main"], first_vectors(model, "attention")
        assert isinstance(branch.scorer, DotScorer)
        found.append(lead_of_equal_ids(branch.scorer, vectors, vectors))
    assert torch.equal(found[0] * 2, found[1])
