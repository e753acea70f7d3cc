"""Margin metric softmax and taxonomy distances; that ranks change nothing is in test_on_ranks."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from embeddings.errors import ConfigError
from tests.helpers.steps import drawn, tasks_of
from trainer.model.frame import Prediction
from trainer.model.heads.retrieval import Retrieved
from trainer.model.settings import ModelConfig
from trainer.objectives import retrieval
from trainer.objectives.retrieval import (
    RetrievalLoss,
    log_shares,
    margin_metric_softmax,
    retrieval_loss_of,
    tree_distance,
)
from trainer.objectives.step_loss import StepLoss


def vectors(seed: int, *shape: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=random, dtype=torch.float64), dim=-1).requires_grad_()


@given(seed=st.integers(0, 999), count=st.integers(2, 9), margin=st.floats(0, 2), scale=st.floats(0.1, 50))
def test_the_form_with_margins_is_the_form_of_the_paper(
    seed: int, count: int, margin: float, scale: float
) -> None:
    """There items are frozen features s, and logits scale * <u - margin * s_y, s_j>."""
    user, s = vectors(seed, count, 5), vectors(seed + 1000, count, 5).detach()
    own = torch.arange(count)
    found = margin_metric_softmax(user, s, own, 1 - s @ s.T, scale, margin)
    paper = F.cross_entropy(scale * (user - margin * s) @ s.T, own, reduction="none")
    torch.testing.assert_close(found, paper, rtol=1e-9, atol=1e-9)
    gradients = [torch.autograd.grad(each.sum(), user)[0] for each in (found, paper)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_without_a_margin_it_is_a_plain_softmax_and_distances_get_no_gradient() -> None:
    user, item, s = vectors(1, 4, 3), vectors(2, 7, 3), vectors(3, 7, 3)
    own, log_share = torch.tensor([2, 0, 6, 5]), torch.rand(7, dtype=torch.float64).log()
    distance = 1 - s[own] @ s.T
    plain = F.cross_entropy(4.0 * user @ item.T - log_share, own, reduction="none")
    none = margin_metric_softmax(user, item, own, distance, 4.0, 0.0, log_share)
    torch.testing.assert_close(none, plain)
    loss = margin_metric_softmax(user, item, own, distance, 4.0, 0.5, log_share)
    assert (loss > plain).all()
    loss.sum().backward()
    assert s.grad is None and user.grad is not None and item.grad is not None


def test_a_farther_negative_must_be_smaller_and_its_own_item_is_none() -> None:
    user, item = vectors(1, 1, 3), vectors(2, 1, 3).detach().expand(3, 3)
    own, distance = torch.tensor([0]), torch.tensor([[0.0, 0.25, 1.0]])
    item = item.clone().requires_grad_()
    same = torch.tensor([[True, False, False]])
    margin_metric_softmax(user, item, own, distance, 5.0, 0.5, same_PC=same).sum().backward()
    assert item.grad is not None
    push = item.grad.norm(dim=1)
    assert push[2] > push[1] > 0
    same = torch.tensor([[True, True, False]])
    item.grad = None
    margin_metric_softmax(user, item, own, distance, 5.0, 0.5, same_PC=same).sum().backward()
    assert (item.grad[1] == 0).all() and (item.grad[0] != 0).all()


def path_length(one: list[int], other: list[int]) -> float:
    """Edges between two leaves, by the most that there can be; walked up level by level."""
    if one[0] == other[0]:
        return 0.0
    depth = 0
    for mine, its in zip(one[1:], other[1:], strict=True):
        if mine != its or mine == 0:
            break
        depth += 1
    leaf = len(one)
    return 2 * (leaf - depth) / (2 * leaf)


@settings(max_examples=50)
@given(st.data())
def test_distances_are_ways_in_the_tree(data: st.DataObject) -> None:
    levels = data.draw(st.integers(0, 3))
    paths = data.draw(
        st.lists(
            st.lists(st.integers(0, 2), min_size=levels + 1, max_size=levels + 1), min_size=1, max_size=6
        )
    )
    given_ = torch.tensor(paths)
    expected = [[path_length(one, other) for other in paths] for one in paths]
    torch.testing.assert_close(tree_distance(given_, given_), torch.tensor(expected))


def test_shares_of_items_are_counted() -> None:
    torch.testing.assert_close(
        log_shares(torch.tensor([7, 3, 7, 7])).exp(), torch.tensor([0.75, 0.25, 0.75, 0.75])
    )


def looped(found: Retrieved, labels: Tensor, weights: Tensor, scale: float, margin: float) -> Tensor:
    """Positive by positive: the mean of their losses."""
    paths, losses = found.path.tolist(), []
    items = [path[0] for path in paths]
    for i in range(len(items)):
        if not labels[i] >= 0.5:
            continue
        terms = {}
        for j in range(len(items)):
            if j != i and items[j] == items[i]:
                continue
            far = 0.0 if i == j else path_length(paths[i], paths[j])
            share = torch.tensor(items.count(items[j]) / len(items), dtype=torch.float64)
            terms[j] = scale * (found.user[i] @ found.item[j] + margin * far) - share.log()
        losses.append(weights[i] * (torch.stack([*terms.values()]).logsumexp(0) - terms[i]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("pairs", [retrieval._PAIRS, 50])
def test_the_loss_of_a_step_is_that_of_a_loop_in_one_piece_and_in_many(pairs: int) -> None:
    count, tasks = 30, tasks_of({}, {"weight": 0.5})
    step = drawn(3, count, 2)
    path = torch.randint(0, 5, (count, 3), generator=torch.Generator().manual_seed(0))
    found = Retrieved(vectors(4, count, 6), vectors(5, count, 6), path)
    loss = RetrievalLoss(tasks[1], 1, 8.0, 0.3)
    of, alone = StepLoss(tasks, retrieval=loss), StepLoss(tasks)
    of.by_task = alone.by_task = True
    prediction = Prediction(step.logits, None, retrieved=found)
    without = alone.of(step.step(), prediction)
    with mock.patch.object(retrieval, "_PAIRS", pairs):
        losses = of.of(step.step(), prediction, 0.7)
        mean = looped(found, step.labels[:, 1], step.weight * step.task_weight[:, 1], 8.0, 0.3)
        extra = losses.total() - without.total()
        torch.testing.assert_close(extra.double(), 0.7 * 0.5 * count * mean, rtol=1e-5, atol=1e-5)
        # The rule that has a backward pass for each task has it in that of its task.
        torch.testing.assert_close(sum(losses.by_task.values()), losses.total())
        assert losses.by_task["a"].item() == without.by_task["a"].item()
        report = of.report(losses.tally.values, losses.tally.counts)
        assert report["retrieval"] == pytest.approx(float(mean.detach()), rel=1e-5)
        expected = torch.autograd.grad(0.7 * 0.5 * count * mean, [found.user, found.item])
        losses.total().backward()
    for part, gradient in zip((found.user, found.item), expected, strict=True):
        torch.testing.assert_close(part.grad, gradient, rtol=1e-5, atol=1e-6)


def test_a_step_without_positives_has_a_gradient_of_zero_and_no_part_in_the_mean() -> None:
    step, found = drawn(3, 8, 1), Retrieved(vectors(4, 8, 6), vectors(5, 8, 6), torch.zeros(8, 1).long())
    step.labels.zero_()
    tasks = tasks_of({})
    of = StepLoss(tasks, retrieval=RetrievalLoss(tasks[0], 0, 8.0, 0.3))
    losses = of.of(step.step(), Prediction(step.logits, None, retrieved=found), 1.0)
    losses.total().backward()
    assert found.user.grad is not None and (found.user.grad == 0).all()
    assert found.item.grad is not None and (found.item.grad == 0).all()
    assert torch.tensor(of.report(losses.tally.values, losses.tally.counts)["retrieval"]).isnan()


def test_the_task_is_the_first_or_the_named_one() -> None:
    tasks, model = tasks_of({}, {}), ModelConfig(auxiliary="retrieval")
    assert retrieval_loss_of(ModelConfig(), tasks) is None
    first = retrieval_loss_of(model, tasks)
    assert first is not None and (first.column, first.scale, first.margin) == (0, 20.0, 0.3)
    named = model.model_copy(update={"retrieval": model.retrieval.model_copy(update={"task": "b"})})
    second = retrieval_loss_of(named, tasks)
    assert second is not None and second.column == 1
    with pytest.raises(ConfigError, match=r"model\.retrieval\.task = 'b': no task has that name"):
        retrieval_loss_of(named, tasks[:1])
    with pytest.raises(ConfigError, match="this task has no loss of its own"):
        retrieval_loss_of(named, tasks_of({}, {"loss": "none"}))
