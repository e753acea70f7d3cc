"""The loss of a step against loops over candidates and pairs, and what it says of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embeddings.errors import ConfigError
from tests.helpers.steps import DOMAINS, Drawn, drawn, looped_loss, tasks_of
from trainer.config.tasks import TaskConfig, resolve_tasks
from trainer.objectives.losses import rank_loss
from trainer.objectives.step_loss import Losses, StepLoss

TASKS = st.fixed_dictionaries(
    {
        "loss": st.sampled_from(["", "bce", "focal"]),
        "weight": st.sampled_from([0.0, 1.0, 0.3]),
        "mean": st.sampled_from(["step", "domain"]),
        "rank": st.sampled_from(["none", "pair", "list", "listce", "jrc"]),
        "bce_weight": st.sampled_from([0.0, 0.5, 0.7, 1.0]),
        "pairs": st.sampled_from(["step", "request", "domain"]),
    }
)


def fitting(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what belongs to a ranking loss where there is none."""
    left_out = ("bce_weight", "pairs") if settings["rank"] == "none" else ()
    return {key: value for key, value in settings.items() if key not in left_out}


def gradients(given: Drawn, loss: Tensor) -> Tensor:
    parts = [given.logits, given.base, given.auxiliary]
    found = torch.autograd.grad(loss, parts, allow_unused=True, retain_graph=True)
    return torch.stack([parts[0] * 0 if part is None else part for part in found])


def trains_something(chosen: list[dict[str, Any]]) -> bool:
    return any(task["weight"] for task in chosen)


@given(
    st.lists(TASKS, min_size=1, max_size=3).filter(trains_something),
    st.integers(0, 99),
    st.integers(1, 16),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_step_is_what_loops_over_candidates_and_pairs_say(
    chosen: list[dict[str, Any]], seed: int, count: int, data: st.DataObject
) -> None:
    tasks = tasks_of(*map(fitting, chosen))
    missing, positives = data.draw(
        st.sampled_from([(0.0, 0.4), (0.3, 0.4), (0.2, 0.0), (0.2, 1.0), (1.0, 0.5)])
    )
    whole = drawn(seed, count, len(tasks), missing, positives)
    losses = whole.losses(StepLoss(tasks, "bce", DOMAINS))
    mean = rank_loss(losses.total(), count, 1, counted=True)
    expected = looped_loss(tasks, whole)
    assert torch.allclose(mean.double(), expected, rtol=1e-5, atol=1e-6)
    if expected.requires_grad:
        assert torch.allclose(
            gradients(whole, mean), gradients(whole, expected).float(), rtol=1e-4, atol=1e-6
        )


def total(tasks: Any, whole: Drawn) -> Tensor:
    return whole.losses(StepLoss(tasks, "bce", DOMAINS)).tally.total / whole.labels.shape[0]


def test_the_mean_of_an_epoch_is_the_same_however_candidates_fall_into_steps() -> None:
    """By sums and counts; a weight of twice as much counts twice, whatever the others weigh."""
    tasks, whole = tasks_of({}, {"weight": 0.3, "mean": "domain"}, {"rank": "list", "pairs": "request"}), None
    whole = drawn(3, 40, 3)
    of = StepLoss(tasks, "bce", DOMAINS)
    # Requests are not cut.
    cut = int((whole.request < 2).sum())
    assert 0 < cut < 40

    def report(parts: list[Drawn]) -> dict[str, Any]:
        tallies = [part.losses(of).tally for part in parts]
        values, counts = (torch.stack([tally[place] for tally in tallies]).sum(0) for place in (0, 1))
        found: dict[str, Any] = of.report(values, counts)
        return found

    once, twice = report([whole]), report([whole.part(slice(0, cut)), whole.part(slice(cut, 40))])
    for one, two in zip(once["tasks"].values(), twice["tasks"].values(), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert once["loss"] == pytest.approx(twice["loss"], rel=1e-5)
    assert once["loss"] == pytest.approx(float(total(tasks, whole)), rel=1e-5)
    double = whole.part(slice(0, 40))
    double.weight.mul_(2)
    assert float(total(tasks_of({}), double)) == pytest.approx(
        2 * float(total(tasks_of({}), whole)), rel=1e-6
    )


def silent(tasks: Any, unobserved: int) -> list[str]:
    whole = drawn(1, 12, len(tasks), missing=0.0)
    whole.labels[:, unobserved] = torch.nan
    losses = whole.losses(StepLoss(tasks, "bce", DOMAINS))
    assert losses.total().isfinite()
    assert (gradients(whole, losses.total())[:, :, unobserved] == 0).all()
    return sorted(losses.silent)


def test_a_task_that_nobody_observed_is_silent_unless_a_product_reaches_it() -> None:
    product = {"product": ("a", "b")}
    assert silent(tasks_of({}, {}), 1) == ["b"]
    assert silent(tasks_of({}, {"loss": "none"}, product), 0) == []
    assert silent(tasks_of({}, {"loss": "none"}, product), 2) == ["b"]
    assert silent(tasks_of({"rank": "pair"}, {"loss": "focal", "mean": "domain"}), 1) == ["b"]


def test_what_a_run_reports() -> None:
    whole = drawn(5, 30, 2, missing=0.0)
    plain = StepLoss(resolve_tasks({}, ["a", "b"]))
    losses = whole.losses(plain)
    assert losses.tally.counts.tolist() == [30, 30] and not losses.silent
    report = plain.report(losses.tally.values, losses.tally.counts)
    assert list(report) == ["loss", "tasks"]
    assert report["loss"] == pytest.approx(sum(task["loss"] for task in report["tasks"].values()) / 2)
    one = StepLoss(tasks_of({"rank": "pair", "bce_weight": 0.25}))
    losses = whole.losses(one)
    losses.parts[0].backward()
    report = one.report(losses.tally.values, losses.tally.counts)
    assert report["loss"] == pytest.approx(0.25 * report["bce"] + 0.75 * report["pair"])
    assert set(report) == {"loss", "bce", "pair", "negative_gradient"}
    negative = whole.labels[:, 0] == 0
    assert whole.logits.grad is not None
    assert report["negative_gradient"] == pytest.approx(float(whole.logits.grad[negative, 0].abs().mean()))
    whole.labels.fill_(torch.nan)
    losses = whole.losses(plain)
    nothing = plain.report(losses.tally.values, losses.tally.counts)
    assert nothing["loss"] == 0 and nothing["tasks"]["a"]["loss"] != nothing["tasks"]["a"]["loss"]


def negative_gradient(rate: float, bce_weight: float) -> float:
    """Of a model that says the base rate to everybody, as early in training."""
    whole = drawn(0, 4000, 1, missing=0.0, positives=0.0).part(slice(0, 4000))
    with torch.no_grad():
        whole.logits.fill_(torch.tensor(rate).logit())
        whole.weight.fill_(1.0)
        whole.task_weight.fill_(1.0)
        whole.labels[: int(rate * 4000)] = 1.0
    of = StepLoss(tasks_of({"rank": "pair", "bce_weight": bce_weight}))
    losses = whole.losses(of)
    rank_loss(losses.total(), 4000, 1, counted=True).backward()
    found: float = of.report(losses.tally.values, losses.tally.counts)["negative_gradient"]
    return found


def test_gradients_of_negatives_vanish_with_the_positives_under_bce_alone() -> None:
    ratios = {
        rate: negative_gradient(rate, 0.0) / negative_gradient(rate, 1.0) for rate in (0.003, 0.05, 0.3)
    }
    assert ratios[0.003] > 100 > ratios[0.05] > 9 > ratios[0.3] > 1
    assert negative_gradient(0.003, 1.0) == pytest.approx(0.003 / 4000, rel=1e-3)


@pytest.mark.parametrize(
    ("problem", "task"),
    [
        (r"tasks: all of them have weight = 0", {"weight": 0}),
        (r"tasks.a.loss = 'focl': no such objective; did you mean 'focal'", {"loss": "focl"}),
        (r"tasks.a.rank = 'pairs': no such ranking loss; did you mean 'pair'", {"rank": "pairs"}),
        (r"tasks.a.rank = 'infonce': .* known here: jrc, list, listce, pair", {"rank": "infonce"}),
        (r'tasks.a.gamma is for loss = "focal", and the loss is .bce.', {"gamma": 1.5}),
        (r'tasks.a.loss = "none": nothing trains the task', {"loss": "none"}),
        (r'tasks.a.mean = "domain": candidates have no domain', {"mean": "domain"}),
        (r'tasks.a.pairs = "domain": candidates have no domain', {"rank": "pair", "pairs": "domain"}),
    ],
)
def test_what_cannot_be_trained_is_refused(problem: str, task: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=problem):
        StepLoss(tasks_of(task))


def test_a_product_has_no_two_logits() -> None:
    with pytest.raises(ConfigError, match=r"tasks.c.rank = 'jrc' needs a logit for each class"):
        StepLoss(tasks_of({}, {}, {"product": ("a", "b"), "rank": "jrc"}))


@pytest.mark.parametrize("settings", [{"pairs": "request"}, {"bce_weight": 0.4}])
def test_settings_of_a_ranking_loss_that_is_not_there_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="belong to a ranking loss"):
        TaskConfig(**settings)


def test_the_base_objective_is_that_of_tasks_that_name_none() -> None:
    whole = drawn(8, 20, 2)
    focal, bce = tasks_of({"loss": "focal"}, {"loss": "bce"}), tasks_of({}, {"loss": "bce"})
    named: Losses = whole.losses(StepLoss(focal))
    assert torch.equal(named.total(), whole.losses(StepLoss(bce, "focal")).total())
