"""Presets with towers: what each must contain to have its paper's name, in the model that training builds."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.launching import ROOT
from tests.helpers.presets import PRESETS, of_tasks
from tests.programs.preset_steps import small_config
from tests.trainer.test_presets import batch_of, log_of_tasks, model_of
from trainer.assemble import resolve_groups
from trainer.log.schema import read_manifest

OF_TASKS = [preset for preset in PRESETS if of_tasks(preset)]
# ESMM is a product of two tasks, and Crocodile has another mean of losses.
NAMING = {"esmm"}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("tasks") / "log")


def test_presets_are_short_and_run_on_any_tasks() -> None:
    assert len(OF_TASKS) == 15
    for preset in OF_TASKS:
        text = (ROOT / f"configs/{preset}.toml").read_text()
        assert len(text.splitlines()) <= 25, preset
        assert ("tasks" in tomllib.loads(text)) == (preset in NAMING), preset


def test_esmm_trains_conversions_on_all_impressions_by_a_product(log: Path) -> None:
    config = small_config("esmm", log)
    model, rows = model_of(config, log)
    names = [task.name for task in model.tasks]
    click, of_clicks, both = (names.index(name) for name in ("click", "conversion_of_clicks", "conversion"))
    assert config.tasks["conversion_of_clicks"].loss == "none"
    batch = batch_of(config, rows)
    logits = model(batch).logits
    p = logits.sigmoid()
    assert torch.allclose(p[:, both], p[:, click] * p[:, of_clicks], atol=1e-6)
    # Observed where the label is, clicked or not; the other one where there was a click.
    seen, clicked = ~batch.labels.isnan(), batch.labels[:, click] == 1
    assert (seen[:, both] & ~clicked).any()
    assert torch.equal(seen[:, of_clicks], seen[:, both] & clicked)
    towers: Any = model.head.towers
    for tower in (towers.task_click, towers.task_conversion_of_clicks):
        (gradient,) = torch.autograd.grad(logits[:, both].sum(), tower.layers[0].weight, retain_graph=True)
        assert gradient.abs().max() > 0


def test_crocodile_gives_no_domain_an_embedding_of_its_own(log: Path) -> None:
    """A census of weights: what is there for each domain are gates and towers."""
    config = small_config("crocodile", log)
    groups = resolve_groups(config, read_manifest(log))
    model, _ = model_of(config, log)
    assert {each.owner for group in groups.values() for each in group.sets} == {"shared"}
    sets, features = groups["representation"].set_names, len(groups["representation"].features)
    assert len(sets) == 4 and len(groups["representation"].tables) == 4 * features
    domains = {
        name
        for name, weight in model.named_parameters()
        if not name.startswith("collections.") and weight.dim() > 1 and weight.shape[0] == model.domains == 3
    }
    assert domains and all(".gates." in name or ".towers." in name for name in domains)
    settings = config.model
    assert settings.experts.shared == 1 and settings.experts.covariance > 0
    assert all(task.mean == "domain" for task in config.tasks.values())
    tables = {name for name, _ in model.named_parameters() if name.startswith("collections.prior.")}
    assert len(tables) == len(groups["prior"].tables), "the prior has tables of its own"


@pytest.mark.parametrize("preset", ["multi_embedding", "multi_embedding_twin"])
def test_experts_of_multi_embedding_share_nothing_and_are_averaged(preset: str, log: Path) -> None:
    config = small_config(preset, log)
    model, rows = model_of(config, log)
    (bank,) = model.head.layers[0].banks["shared"].values()  # type: ignore[index,union-attr,operator]
    assert (config.model.mixer.kind, bank.activates, len(bank.layers[0].weight)) == ("mean", True, 4)
    weight = bank.layers[0].weight
    assert all(not torch.equal(weight[a], weight[b]) for a in range(4) for b in range(a))
    # One search for all sets.
    calls = []
    search: Any = model.branches["main"].search  # type: ignore[union-attr]
    search.register_forward_hook(lambda *_: calls.append(1))
    model(batch_of(config, rows))
    assert len(calls) == 1


@pytest.mark.parametrize("preset", ["stem", "stem_twin"])
@pytest.mark.parametrize("layers", [1, 2])
def test_stem_reads_all_sets_and_trains_no_foreign_one(preset: str, layers: int, log: Path) -> None:
    """From the logits to the tables, in the whole model."""
    config = small_config(preset, log)
    experts = config.model.experts.model_copy(update={"layers": layers})
    config = config.model_copy(update={"model": config.model.model_copy(update={"experts": experts})})
    model, rows = model_of(config, log)
    batch = batch_of(config, rows)
    weights = {
        name: weight
        for name, weight in model.named_parameters()
        if name.startswith("collections.representation")
    }
    for column, (own, other) in enumerate((("click", "conversion"), ("conversion", "click"))):
        loss = model(batch).logits[:, column].square().sum()
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        moved = {
            name: gradient is not None and bool(gradient.any())
            for name, gradient in zip(weights, found, strict=True)
        }
        of_sets = {
            set_: {moved[name] for name in weights if f"/{set_}/" in name} for set_ in ("shared", own, other)
        }
        assert of_sets == {"shared": {True}, own: {True}, other: {False}}
        before = model(batch).logits[:, column].detach()
        with torch.no_grad():
            for name, weight in weights.items():
                if f"/{other}/" in name:
                    weight.copy_(weight.flip(0))
        assert (model(batch).logits[:, column] - before).abs().max() > 1e-4
