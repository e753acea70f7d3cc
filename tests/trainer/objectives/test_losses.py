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
from trainer.objectives.bce import bce
from trainer.objectives.losses import Losses, losses_of
from trainer.objectives.table import OBJECTIVES, objective_of


def drawn(tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(tasks)
    logits = torch.randn(103, tasks, generator=random, requires_grad=True)
    labels = torch.rand(103, tasks, generator=random).round()
    return logits, labels, torch.rand(103, generator=random) * 3


@pytest.mark.parametrize("tasks", [1, 2, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_without_missing_labels_the_bits_are_those_of_one_fused_loss(tasks: int, labelled: bool) -> None:
    logits, labels, weight = drawn(tasks)
    fused = F.binary_cross_entropy_with_logits(logits, labels, weight[:, None], reduction="sum") / tasks
    (expected,) = torch.autograd.grad(fused * 0.37, logits)
    losses = losses_of(bce, logits, labels, weight, labelled)
    (gradient,) = torch.autograd.grad(losses.total() * 0.37, logits)
    assert torch.equal(losses.total(), fused) and torch.equal(gradient, expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_missing_label_is_as_no_candidate(name: str) -> None:
    logits, labels, weight = drawn(2)
    missing = torch.rand(labels.shape, generator=torch.Generator().manual_seed(9)) < 0.4
    gaps = torch.where(missing, torch.nan, labels)
    losses = losses_of(OBJECTIVES[name], logits, gaps, weight)
    sums, counts = losses.sums(["a", "b"]), losses.counts(["a", "b"])
    for task, each in enumerate(("a", "b")):
        known = ~missing[:, task]
        alone = losses_of(OBJECTIVES[name], logits[known][:, [task]], labels[known][:, [task]], weight[known])
        assert torch.allclose(sums[each], alone.total()) and int(counts[each]) == int(known.sum())
    assert torch.allclose(losses.total(), (sums["a"] + sums["b"]) / 2)
    (gradient,) = torch.autograd.grad(losses.total(), logits)
    assert (gradient[missing] == 0).all() and (gradient[~missing] != 0).all()


def test_a_task_without_labels_has_no_loss_and_no_candidates() -> None:
    logits, labels, weight = drawn(2)
    labels[:, 1] = torch.nan
    losses = losses_of(bce, logits, labels, weight)
    sums = {task: float(each.detach()) for task, each in losses.sums("ab").items()}
    assert sums["b"] == 0 < sums["a"] and int(losses.counts("ab")["b"]) == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(value: float) -> None:
    """A missing label hides neither a broken weight nor a broken logit, or the guard would not see it."""
    logits, labels, weight = drawn(1)
    labels[0] = torch.nan
    assert not losses_of(bce, logits, labels, weight.index_fill(0, torch.tensor(0), value)).total().isfinite()
    broken = logits.detach().index_fill(0, torch.tensor(0), value).requires_grad_()
    total = losses_of(bce, broken, labels, weight).total()
    (gradient,) = torch.autograd.grad(total, broken)
    assert not torch.stack([total, *gradient.unbind()[0]]).isfinite().all()


def test_an_unknown_objective_is_refused_with_a_near_name_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train.objective = 'bec': no such objective; did you mean 'bce'"):
        objective_of("bec")
    with pytest.raises(ConfigError, match=r"train.objective = 'ranking': .* known here: bce"):
        log = small_log(tmp_path / "log", users=4)
        words = [f"data.log={log}", "train.objective=ranking"]
        pipelines.train.check(Path("configs/dare.toml"), tmp_path / "run", words)


def test_an_objective_may_add_up_anything() -> None:
    """Its terms need not be one a candidate."""
    labels = torch.zeros(4, 2)
    losses = Losses(torch.tensor([[1.0, 2.0]]), labels)
    assert {name: float(each) for name, each in losses.sums("ab").items()} == {"a": 1.0, "b": 2.0}
    assert float(losses.total()) == 1.5
