"""The auxiliary head `retrieval`: what it is made of, what it trains, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from embeddings.errors import ConfigError
from tests.helpers.models import batch_of, model_of, preset, stage_one, table_gradient, with_ids
from tests.helpers.models import small_log as write_small_log
from trainer.assemble import resolve_groups
from trainer.log.schema import read_manifest
from trainer.loop.remarks import _of_model
from trainer.model.settings import ModelConfig
from trainer.model.windows import first_ids
from trainer.run_config import Config

ON = ("model.auxiliary=retrieval", 'model.retrieval.taxonomy=["category_id"]', "model.retrieval.dim=5")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_log(tmp_path_factory.mktemp("log") / "log")


def test_a_users_vector_is_made_of_the_windows_mean_and_an_items_of_the_candidate(log: Path) -> None:
    config = preset("dare", log, *ON)
    model, batch = model_of(config).train(), batch_of(config)
    found, raw = model(batch).retrieved, stage_one(model, batch)["main"].raw
    assert model.eval()(batch).retrieved is None
    for c, request in enumerate(batch.candidate_request.tolist()):
        keys = raw.key_ND[int(batch.window_start[request]) : int(batch.window_end[request])]
        mean = keys.mean(0) if keys.shape[0] else raw.key_ND.new_zeros(raw.key_ND.shape[1])
        user = F.normalize(model.auxiliary.user([mean[None]]), dim=1)[0]
        torch.testing.assert_close(found.user[c], user, rtol=1e-4, atol=1e-5)
    item = F.normalize(model.auxiliary.item([raw.query_CD]), dim=1)
    torch.testing.assert_close(found.item, item)
    ids = [first_ids(batch, feature)[1] for feature in ("item_id", "category_id")]
    assert torch.equal(found.path, torch.stack(ids, 1)) and found.user.shape[1] == 5


def test_it_trains_attention_of_the_whole_window_and_no_representation(log: Path) -> None:
    config = preset("dare", log, *ON)
    model, batch = model_of(config).train(), batch_of(config)
    found = model(batch).retrieved
    (found.user * found.item).sum().backward()
    assert (table_gradient(model, "attention") != 0).any()
    assert (table_gradient(model, "representation") == 0).all()


def test_ids_of_candidates_change_no_user(log: Path) -> None:
    config = preset("dare", log, *ON)
    model, batch = model_of(config).train(), batch_of(config)
    n = batch.behaviors
    others = with_ids(batch, lambda _, ids: torch.cat([ids[:n], ids[n:].flip(0)]))
    before, after = (model(each).retrieved for each in (batch, others))
    assert torch.equal(before.user, after.user) and not torch.equal(before.item, after.item)
    same = batch.candidate_request[1:] == batch.candidate_request[:-1]
    assert same.any() and torch.equal(before.user[1:][same], before.user[:-1][same])


def settings(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"auxiliary": "retrieval", **changes})


def test_attention_that_a_task_owns_is_trained_by_that_tasks_positives() -> None:
    with pytest.raises(ValueError, match=r'set retrieval\.task = "buy" too'):
        settings(attention_owner="buy")
    assert settings(attention_owner="buy", retrieval={"task": "buy"}).retrieval.task == "buy"
    with pytest.raises(ValueError, match="needs attention vectors"):
        settings(attend=[])


def test_features_that_are_not_there_and_cut_histories_are_refused(log: Path) -> None:
    missing = preset("dare", log, *ON[:1], 'model.retrieval.taxonomy=["category_id","brand"]')
    with pytest.raises(ConfigError, match=r"model\.retrieval\.taxonomy\[1\].*'brand'"):
        resolve_groups(missing, read_manifest(log))
    cut = {"data": {"search": {"levels": ["category_id"]}}, "model": {"auxiliary": "retrieval"}}
    with pytest.raises(ValueError, match='auxiliary = "retrieval" must not see which behaviors a search'):
        Config.model_validate(cut)


def test_keys_without_effect_are_told() -> None:
    lines = _of_model(ModelConfig.model_validate({"retrieval": {"margin": 0.1}}))
    assert len(lines) == 1 and 'model.auxiliary is "none"' in lines[0] and "model.retrieval" in lines[0]
    assert not _of_model(settings(retrieval={"margin": 0.1}))
