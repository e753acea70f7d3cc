"""What belongs to which branch and loss: DSI-TIN, SIM, ETA, DARE's auxiliary loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.launching import ROOT
from tests.helpers.logs import FEATURES
from tests.helpers.models import (
    batch_of,
    draw,
    drawing,
    model_of,
    preset,
    small_log,
    stage_one,
    table_gradient,
    watch,
    with_ids,
)
from trainer.data.batch import RequestBatch
from trainer.model.frame import TwoStageModel
from trainer.model.retrieve.simhash import HammingSearch
from trainer.run_config import load_config


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("branches") / "log")


def other_behaviors(batch: RequestBatch) -> RequestBatch:
    behavior = torch.arange(batch.features.stride()) < batch.behaviors
    return with_ids(batch, lambda key, ids: torch.where(behavior, (ids + 1) % FEATURES[key], ids))


def other_times(batch: RequestBatch) -> RequestBatch:
    """Other gaps; ranks stay what they are."""
    return replace(batch, behavior_time=batch.behavior_time - 7 * torch.arange(batch.behaviors).flip(0))


@pytest.mark.parametrize(("change", "blind"), [(other_behaviors, "main"), (other_times, "content")])
def test_dsi_d1_a_branch_attends_to_its_own_fields_and_pools_all(log: Path, change, blind: str) -> None:  # type: ignore[no-untyped-def]
    """Other content: the time branch keeps and weighs bit for bit the same, and pools something else. And the
    other way round."""
    config = preset("dsi_tin", log)
    model, batch = model_of(config).eval(), batch_of(config)
    draw(model.branches["main"].sequence.time, drawing(3))
    found = []
    for asked in (batch, change(batch)):
        seen = watch(model)
        with torch.no_grad():
            model(asked)
        found.append(dict(seen))
    (sighted,) = {"main", "content"} - {blind}
    before, after = found
    full = before[blind][0].selection.mask.any(1)
    assert torch.equal(before[blind][0].selection.index, after[blind][0].selection.index)
    assert torch.equal(before[blind][1], after[blind][1])
    assert ((before[blind][2][1] - after[blind][2][1])[full].abs().amax(1) > 1e-4).float().mean() > 0.9
    assert not torch.allclose(before[sighted][1], after[sighted][1], atol=1e-2)
    for _, weight, _ in found[0].values():  # each normalised on its own
        assert torch.allclose(weight.sum(2)[full], torch.ones(()))


@pytest.mark.parametrize(("attended", "ignored"), [("category_id", "item_id"), ("item_id", "category_id")])
def test_a_branch_scores_the_features_that_it_attends_to_alone(
    log: Path, attended: str, ignored: str
) -> None:
    config = preset("dare", log, f'model.attend=["{attended}"]')
    model, batch = model_of(config), batch_of(config)

    def stage(changed: str) -> tuple[Tensor, Tensor]:
        """What is kept, and its weights, after other ids of one feature, in behaviors and candidates."""
        asked = with_ids(batch, lambda key, ids: (ids + 1) % FEATURES[key] if key == changed else ids)
        with torch.no_grad():
            found = stage_one(model, asked)["main"]
            return found.selection.index, model.branches["main"].weigh(found)

    before, same, other = stage("none"), stage(ignored), stage(attended)
    assert all(torch.equal(a, b) for a, b in zip(before, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, other, strict=True))


@pytest.mark.parametrize(
    ("name", "grouped"), [("tdpe", True), ("dpe", True), ("td_sasrec", True), ("twin_paper_dare", False)]
)
def test_targets_are_grouped_by_the_feature_of_the_setting(log: Path, name: str, grouped: bool) -> None:
    """With empty vectors of the category, a candidate's category can matter as its group alone."""
    config = preset(name, log)
    model, batch = model_of(config).eval(), batch_of(config)
    candidate = torch.arange(batch.features.stride()) >= batch.behaviors
    other = with_ids(
        batch, lambda key, ids: torch.where(candidate, (ids + 1) % 9, ids) if key == "category_id" else ids
    )
    with torch.no_grad():
        model.collections["shared"].shared__category_id.zero_()
        change = (model(other).logits - model(batch).logits).abs().amax(1)
    seen = (batch.window_end > batch.window_start + 1)[batch.candidate_request]
    assert seen.any()
    assert (change[seen] > 1e-4).all() if grouped else (change == 0).all()


@pytest.mark.parametrize(("trained", "other"), [("main", "content"), ("content", "main")])
def test_dsi_branches_share_no_table(log: Path, trained: str, other: str) -> None:
    """Nothing of a branch's output reaches the other's tables, attention or representation."""
    group = {"main": "timely", "content": "content"}
    config = preset("dsi_tin", log)
    model = model_of(config)
    seen = watch(model)
    model(batch_of(config))
    sum(part.square().sum() for part in seen[trained][2]).backward()
    assert (table_gradient(model, group[other]) == 0).all()
    assert (table_gradient(model, group[trained]) != 0).any()


@pytest.mark.parametrize("single", ["dare", "twin_paper_dare", "tdpe", "dpe", "stacked_tin"])
def test_dsi_d3_branches_keep_as_many_behaviors_as_a_single_one(single: str) -> None:
    dsi, one = (load_config(ROOT / f"configs/{name}.toml").model for name in ("dsi_tin", single))
    assert len(dsi.all_branches()) == 2 and len(one.all_branches()) == 1
    kept = [sum(branch.k for branch in model.all_branches().values()) for model in (dsi, one)]
    assert kept[0] == kept[1]
    assert {branch.search for branch in dsi.all_branches().values()} == {one.search} == {"dot"}


@pytest.mark.parametrize("auxiliary", ["none", "softmax"])
def test_dare_auxiliary_loss_alone_trains_attention_to_what_was_not_kept(log: Path, auxiliary: str) -> None:
    """The main loss reaches attention tables through the K kept scores, the auxiliary loss through all L."""
    changes = ("model.lookup=full", f"model.auxiliary={auxiliary}", "tables.item_id.rows=2000", "model.k=2")
    config = preset("dare", log, *changes)
    # an item of its own for every behavior and candidate, so that rows tell them apart
    batch = with_ids(batch_of(config), lambda key, ids: torch.arange(len(ids)) if key == "item_id" else ids)
    model = model_of(config).train()
    found = stage_one(model, batch)["main"]
    windows, kept = found.windows.of_candidates(), found.selection
    missed = set(windows.index[windows.mask].tolist()) - set(kept.index[kept.mask].tolist())
    prediction = model(batch)
    assert (prediction.auxiliary is None) == (auxiliary == "none")
    total = prediction.logits.sum()
    if prediction.auxiliary is not None:
        total = total + prediction.auxiliary.sum()
    total.backward()
    gradient = model.collections["attention"].attention__item_id.grad[: batch.behaviors]
    trained = set((gradient != 0).any(1).nonzero().squeeze(1).tolist())
    assert len(missed) > 20
    assert trained & missed == (missed if auxiliary == "softmax" else set())
    assert len(trained - missed) > 10


def test_auxiliary_head_is_for_training_only(log: Path) -> None:
    config = preset("sim_soft", log)
    model, batch = model_of(config), batch_of(config)
    assert model.train()(batch).auxiliary is not None
    assert model.eval()(batch).auxiliary is None


def gradients(model: TwoStageModel, loss: Tensor) -> dict[str, bool]:
    """Which parameters a loss reaches."""
    model.zero_grad(set_to_none=True)
    loss.backward(retain_graph=True)
    return {name: p.grad is not None and bool((p.grad != 0).any()) for name, p in model.named_parameters()}


def test_sim_index_is_trained_by_its_own_loss_and_trains_nothing_of_stage_two(log: Path) -> None:
    config = preset("sim_soft", log)
    model, batch = model_of(config).train(), batch_of(config)
    prediction = model(batch)
    main, auxiliary = (gradients(model, logits.square().sum()) for logits in prediction[:2])
    index = {name for name in main if ".search.index." in name}
    own = {name for name in main if name.startswith("auxiliary.")}
    tables = {name for name in main if name.startswith("collections.")}
    stage_two = set(main) - index - own - tables
    assert (
        len(index) == 2
        and own
        and tables
        and {name.split(".")[0] for name in stage_two} == {"branches", "head"}
    )
    reached = [{name for name, found in each.items() if found} for each in (main, auxiliary)]
    assert reached[0] == stage_two | tables
    assert reached[1] == index | own | tables


def test_sim_index_alone_decides_what_is_kept(log: Path) -> None:
    config = preset("sim_soft", log)
    model, batch = model_of(config), batch_of(config)
    branch, before = model.branches["main"], model.search(batch)["main"].index
    torch.nn.init.normal_(branch.scorer.key.weight)
    assert torch.equal(model.search(batch)["main"].index, before)
    torch.nn.init.normal_(branch.search.index.key.weight)
    assert not torch.equal(model.search(batch)["main"].index, before)


def test_eta_codes_follow_every_update_of_the_tables(log: Path) -> None:
    """No buffer of codes: after a step the search equals that of a fresh model with the same tables."""
    config = preset("eta", log, "model.hash_bits=64")
    model, batch = model_of(config), batch_of(config)
    before = model.search(batch)["main"]
    model(batch).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=5.0).step()
    after = model.search(batch)["main"]
    fresh = model_of(config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.search(batch)["main"].index, after.index)
    assert not torch.equal(before.index, after.index)

    vectors, search = (
        model.lookups({"shared": model.collections["shared"](batch.features)})["shared"].detach(),
        model.branches["main"].search,
    )
    assert isinstance(search, HammingSearch)
    assert {name for name, _ in search.named_buffers()} == {"planes"}
    bits = (vectors @ search.planes > 0).long()
    window = stage_one(model, batch)["main"].windows.of_candidates()
    for c in range(batch.candidates):
        index = window.index[c][window.mask[c]]
        distance = (bits[index] != bits[batch.behaviors + c]).sum(1)
        best = distance.argsort(stable=True)[: config.model.k].sort().values
        assert after.index[c][after.mask[c]].tolist() == index[best].tolist()
