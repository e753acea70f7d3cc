"""The probe of a checkpoint: against plain autograd on the tables, one loss at a time."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.helpers.models import batch_of, model_of, preset
from tests.trainer.test_presets import log_of_tasks
from trainer.analysis.gradients import Puller, probe
from trainer.model.frame import TwoStageModel

DOMAINS = 'data.domain="domain_id"'


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("tasks") / "log")


def table_gradients(model: TwoStageModel, loss: Tensor, group: str) -> dict[str, Tensor]:
    """Of the tables of a group, by name."""
    tables = model.lookups.groups[group].tables
    names = [model.lookups.groups[group].table_name(spec) for spec in tables]
    weights = [model.get_parameter(f"collections.{group}.{name}") for name in names]
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(weight) if gradient is None else gradient
        for name, weight, gradient in zip(names, weights, found, strict=True)
    }


def looked_up(model: TwoStageModel, batch: object, group: str) -> dict[str, Tensor]:
    groups = model.lookups.groups
    return {
        groups[group].table_name(spec): batch.features[spec.key].values().unique()  # type: ignore[attr-defined]
        for spec in groups[group].tables
    }


@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_norms_and_cosines_are_those_of_plain_autograd(log: Path, lookup: str) -> None:
    """Two tasks and three domains, of tables that serve one role each."""
    config = preset("mmoe", log, DOMAINS, f"model.lookup={lookup}")
    model, batch = model_of(config).eval(), batch_of(config)
    found = probe(model, [batch], config.train.objective, config.train.mean)
    assert set(found) == {"attention", "representation"}
    tasks = {task.name: column for column, task in enumerate(model.tasks)}
    for group, pulls in found.items():
        prediction = model(batch)
        expected = {}
        observed = ~batch.labels.isnan()
        weight = batch.weight[:, None] * torch.ones_like(batch.labels)
        if batch.task_weight is not None:
            weight = weight * batch.task_weight
        points = F.binary_cross_entropy_with_logits(
            prediction.logits, batch.labels.nan_to_num(), weight, reduction="none"
        )
        scale = torch.tensor([task.weight for task in model.tasks])
        for name, column in tasks.items():
            there = observed[:, column]
            expected[Puller(name, group)] = scale[column] * points[there, column].sum() / there.sum()
        for domain in range(3):
            there = observed & (batch.domain == domain)[:, None]
            parts = (points * there).sum(0) / there.sum(0)
            expected[Puller(f"domain {domain}", group)] = (parts * scale).sum()
        assert set(pulls.norms) == set(expected)
        rows = looked_up(model, batch, group)
        gradients = {
            puller: {table: part[rows[table]] for table, part in table_gradients(model, loss, group).items()}
            for puller, loss in expected.items()
        }
        for puller, tables in gradients.items():
            norm = torch.cat([part.norm(dim=1) for part in tables.values()]).mean()
            assert pulls.norms[puller] == pytest.approx(float(norm), rel=1e-3), puller
        for one, other in combinations(sorted(expected), 2):
            a, b = (
                torch.cat([each.double() for each in gradients[puller].values()]) for puller in (one, other)
            )
            cosines = F.cosine_similarity(a, b, dim=1)[(a.norm(dim=1) > 0) & (b.norm(dim=1) > 0)]
            pair = pulls.pairs[one, other]
            assert pair.cosine == pytest.approx(float(cosines.mean()), abs=2e-3)
            assert pair.whole == pytest.approx(float((a * b).sum() / a.norm() / b.norm()), abs=2e-3)
            assert pair.conflict == pytest.approx(float((cosines < 0).double().mean()), abs=0.05)


def test_roles_of_one_table_are_told_apart(log: Path) -> None:
    config = preset("twin_paper_dare", log)
    model, batch = model_of(config).eval(), batch_of(config)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    found = probe(model, [batch], config.train.objective, config.train.mean)
    (pulls,) = found.values()
    assert {puller.role for puller in pulls.norms} == {"attention", "representation"}
    assert all(-1 <= pair.cosine <= 1 and 0 <= pair.conflict <= 1 for pair in pulls.pairs.values())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())
