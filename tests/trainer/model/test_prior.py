"""What only gates read of candidates and requests: looked up once, for candidates and requests alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings.errors import ConfigError
from tests.helpers.logs import enrich, random_rows, write_log
from tests.helpers.models import batch_of, model_of
from trainer.assemble import resolve_groups
from trainer.data.batch import RequestBatch
from trainer.log.schema import read_manifest
from trainer.loop.remarks import remarks
from trainer.model.frame import TwoStageModel
from trainer.model.heads.head import HeadInput
from trainer.run_config import Config
from trainer.step_size import StepSize, lookups

GATED = {
    "head": "experts",
    "hidden": [8],
    "experts": {"shared": 2},
    "mixer": {"kind": "softmax", "gate": "prior"},
    "k": 3,
}
KNOWN = {"dim": 4, "init_scale": 1.0, "features": ["item_id", "band"]}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = enrich(random_rows(5), seed=1)
    return write_log(tmp_path_factory.mktemp("prior") / "log", {"train": rows}, rich=True)


def config(log: Path, groups: dict[str, Any], roles: dict[str, str], **model: Any) -> Config:
    all_groups = {"attention": {"dim": 4}, "representation": {"dim": 8, "features": ["item_id"]}, **groups}
    return Config.model_validate(
        {
            "data": {"log": str(log), "history_length": 8, "batch_candidates": 60, "prefetch": 0},
            "groups": all_groups,
            "model": {**GATED, "roles": roles, **model},
        }
    )


def asked(model: TwoStageModel, batch: RequestBatch) -> tuple[HeadInput, dict[str, list[int]]]:
    """What the head was given, and how many bags each lookup of a group was asked for."""
    found: list[HeadInput] = []
    bags: dict[str, list[int]] = {}
    model.head.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    for name, collection in model.collections.items():
        collection.register_forward_hook(
            lambda _, given, __, name=name: bags.setdefault(name, []).append(given[0].stride())
        )
    model(batch).logits.square().sum().backward()
    return found[0], bags


def rows_of(model: TwoStageModel, group: str, ids: dict[str, Tensor]) -> Tensor:
    tables = model.collections[group]
    return torch.cat([getattr(tables, f"{group}__{name}")[of] for name, of in ids.items()], dim=1)


@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_a_prior_is_looked_up_for_candidates_and_requests_alone(log: Path, lookup: str) -> None:
    groups = {"known": KNOWN, "user": {"dim": 4, "init_scale": 1.0, "features": ["city"]}}
    settings = config(log, groups, {"prior": "known", "prior_context": "user"}, lookup=lookup)
    model, batch = model_of(settings), batch_of(settings)
    given, bags = asked(model, batch)
    assert bags["known"] == [batch.candidates] and bags["user"] == [batch.requests]
    n = batch.behaviors
    ids = {"item_id": batch.features["item_id"].values()[n:], "band": batch.features["band"].values()}
    of_requests = rows_of(model, "user", {"city": batch.context["city"].values()})
    expected = torch.cat([rows_of(model, "known", ids), of_requests[batch.candidate_request]], dim=1)
    assert torch.equal(given.prior, expected)
    for group in ("known", "user"):
        gradient = [table.grad for table in model.collections[group].parameters()]
        assert all(each is not None and each.abs().max() > 0 for each in gradient)
    assert sum(part.shape[1] for part in given.parts) == 3 * 8 + batch.numeric.shape[1]


@pytest.mark.parametrize("lookup", ["selected", "full"])
@pytest.mark.parametrize("group", ["representation", "attention"])
def test_a_group_that_serves_another_role_too_is_looked_up_once(log: Path, lookup: str, group: str) -> None:
    settings = config(log, {}, {"prior": group}, lookup=lookup)
    model, batch = model_of(settings), batch_of(settings)
    given, bags = asked(model, batch)
    assert all(len(each) == 1 for each in bags.values())
    ids = batch.features["item_id"].values()[batch.behaviors :]
    width = {"representation": 8, "attention": 4}[group]
    assert torch.equal(given.prior[:, :width], rows_of(model, group, {"item_id": ids}))


def test_one_group_may_be_context_and_prior(log: Path) -> None:
    groups = {"user": {"dim": 4, "features": ["city"]}}
    settings = config(log, groups, {"context": "user", "prior_context": "user"})
    given, bags = asked(model_of(settings), batch_of(settings))
    assert len(bags["user"]) == 1 and torch.equal(given.prior, given.beside[-1])


def test_without_a_prior_there_is_none(log: Path) -> None:
    settings = config(log, {}, {}, mixer={"kind": "mean"})
    given, bags = asked(model_of(settings), batch_of(settings))
    assert given.prior is None and given.domain is None and set(bags) == {"attention", "representation"}


def test_a_step_asks_the_prior_for_candidates_and_every_set_for_what_was_kept(log: Path) -> None:
    groups = {"known": KNOWN, "user": {"dim": 4, "features": ["city"]}}
    groups["representation"] = {"dim": 8, "features": ["item_id"], "sets": 3}
    settings = config(log, groups, {"prior": "known", "prior_context": "user"})
    manifest = read_manifest(log)
    size = StepSize(400, 60, 20, ((200, 30),) * 2, "")
    found = lookups(settings, resolve_groups(settings, manifest), manifest, size, "selected")
    assert {name: found[name].bags for name in ("known__item_id", "known__band", "user__city")} == {
        "known__item_id": 60,
        "known__band": 60,
        "user__city": 20,
    }
    kept = {found[f"representation/{name}/item_id"].bags for name in "012"}
    assert len(kept) == 1 and 60 < kept.pop() < 460


def test_a_branch_has_no_prior_of_its_own(log: Path) -> None:
    groups = {"known": KNOWN, "other": KNOWN}
    branch = {"recent": {"search": "recent", "roles": {"prior": "other"}}}
    with pytest.raises(ValueError, match=r"model\.roles alone names prior"):
        config(log, groups, {"prior": "known"}, branches=branch)


def test_a_domain_that_the_model_reads_needs_a_table(log: Path) -> None:
    groups = {"attention": {"dim": 4, "features": ["item_id"]}}
    settings = config(log, groups, {}, mixer={"kind": "softmax", "per": "domain"})
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"domain": "band"})})
    with pytest.raises(ConfigError, match=r"data\.domain = 'band': the model reads it, but no group has a"):
        resolve_groups(settings, read_manifest(log))


@pytest.mark.parametrize(("feature", "without_effect"), [("band", False), ("action", True)])
def test_a_prior_wants_features_of_candidates(log: Path, feature: str, without_effect: bool) -> None:
    settings = config(log, {"known": {**KNOWN, "features": [feature]}}, {"prior": "known"})
    manifest = read_manifest(log)
    said = "\n".join(remarks(settings, manifest, resolve_groups(settings, manifest)))
    assert (f"{feature} in groups.known" in said) == without_effect
