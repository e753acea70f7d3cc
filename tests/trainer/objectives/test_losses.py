"""Objectives: the same bits as one fused loss, and labels that were not observed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pipelines.train
from embeddings.errors import ConfigError
from tests.helpers.logs import small_log
from tests.helpers.steps import Drawn, drawn
from trainer.config.tasks import resolve_tasks
from trainer.objectives.bce import loss_sum
from trainer.objectives.losses import rank_loss
from trainer.objectives.step_loss import StepLoss
from trainer.objectives.table import OBJECTIVES, objective_of


def loss_of(given: Drawn, name: str = "bce") -> Tensor:
    """By labels that all are tasks, as without a section [tasks]; there is no auxiliary head."""
    tasks = resolve_tasks({}, ["a", "b", "c"][: given.labels.shape[1]])
    prediction = given.prediction()._replace(auxiliary=None)
    return StepLoss(tasks, name).of(given.step(), prediction).total()


@pytest.mark.parametrize("tasks", [1, 2, 3])
def test_without_missing_labels_the_bits_are_those_of_one_fused_loss(tasks: int) -> None:
    given = drawn(tasks, 103, tasks, missing=0.0)
    given.task_weight.fill_(1.0)
    plain = given.logits, given.labels, given.weight[:, None]
    fused = F.binary_cross_entropy_with_logits(*plain, reduction="sum") / tasks
    (expected,) = torch.autograd.grad(rank_loss(fused, 103, 1, counted=True), given.logits)
    total = loss_of(given)
    (gradient,) = torch.autograd.grad(rank_loss(total, 103, 1, counted=True), given.logits)
    assert torch.equal(total, fused) and torch.equal(gradient, expected)
    assert torch.equal(total, loss_sum(given.logits, given.labels, given.weight))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_missing_label_is_as_no_candidate(name: str) -> None:
    given = drawn(4, 50, 1, missing=0.4)
    known = ~given.labels[:, 0].isnan()
    rows = known.nonzero()[:, 0]
    alone = Drawn(**{key: part[rows].detach().clone() for key, part in vars(given).items()})
    mean = loss_of(given, name) / 50
    assert torch.allclose(mean, loss_of(alone, name) / len(rows), rtol=1e-6)
    (gradient,) = torch.autograd.grad(mean, given.logits)
    weighs = known & (given.weight > 0)
    assert (gradient[~known] == 0).all() and (gradient[weighs] != 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    """A missing label hides neither a broken weight nor a broken logit, or the guard would not see it."""
    given = drawn(1, 20, 1, missing=0.0)
    given.labels[0] = torch.nan
    given.weight[0] = value
    assert not loss_of(given).isfinite()
    given.weight[0] = 1.0
    with torch.no_grad():
        given.logits[0] = value
    total = loss_of(given)
    (gradient,) = torch.autograd.grad(total, given.logits)
    assert not torch.stack([total, *gradient.unbind()[0]]).isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_losses_and_gradients_are_finite_however_sure_the_model_is(name: str, logit: float) -> None:
    given = drawn(2, 20, 1, missing=0.1)
    with torch.no_grad():
        given.logits.fill_(logit)
    total = loss_of(given, name)
    (gradient,) = torch.autograd.grad(total, given.logits)
    assert total.isfinite() and gradient.isfinite().all()


def test_an_unknown_objective_is_refused_with_a_near_name_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.objective = 'bec': no such objective; did you mean 'bce'"):
        objective_of("bec")
    log = small_log(tmp_path / "log", users=4)
    for key in ("train.objective", "tasks.click.loss"):
        with pytest.raises(ConfigError, match=rf"{key} = 'ranking': .* known here: bce, focal"):
            words = [f"data.log={log}", f"{key}=ranking"]
            pipelines.train.check(Path("configs/dare.toml"), tmp_path / "run", words)
