"""Averages of dense weights: the recursion is the closed form, and what they are good for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from embeddings.errors import ConfigError
from trainer.config.phases import AverageConfig
from trainer.update.averaging import Average, beta_density
from trainer.update.row_averages import RowAverages

BETAS = st.one_of(st.floats(0.01, 3.0), st.just(1.0), st.just(200.0))


def run(config: AverageConfig, path: list[Tensor], steps: int | None = None) -> Tensor:
    """The average over a path of weights, the first of which are those at the phase's start."""
    weight = path[0].clone()
    average = Average(config, "one", {"w": weight}, steps)
    for now in path[1:]:
        weight.copy_(now)
        average.add()
    return average.averages["w"]


def walk(steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(steps + 1, 3, 2, generator=generator).cumsum(0))


def weighted(log_weights: Tensor, path: list[Tensor]) -> Tensor:
    """The closed form."""
    return (log_weights.softmax(0)[:, None, None] * torch.stack(path).double()).sum(0)


def log_density(beta: float, steps: int) -> Tensor:
    """By another library's Beta distribution."""
    at = (torch.arange(steps + 1, dtype=torch.float64) + 0.5) / (steps + 1)
    b = torch.tensor(beta, dtype=torch.float64)
    return torch.distributions.Beta(b, b).log_prob(at)


@settings(max_examples=60, deadline=None)
@given(beta=BETAS, steps=st.integers(1, 120), seed=st.integers(0, 99))
def test_the_recursion_is_the_closed_form(beta: float, steps: int, seed: int) -> None:
    path = walk(steps, seed)
    found = run(AverageConfig(kind="beta", beta=beta), path, steps)
    torch.testing.assert_close(found, weighted(log_density(beta, steps), path), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(decay=st.floats(0, 0.9999999), steps=st.integers(1, 120), seed=st.integers(0, 99))
def test_the_moving_average_is_its_closed_form_from_the_first_step_on(
    decay: float, steps: int, seed: int
) -> None:
    path = walk(steps, seed)
    # The newest counts 1, the one before it `decay`, and so on.
    ages = torch.arange(steps, -1, -1, dtype=torch.float64)
    logs = ages * math.log(decay) if decay else torch.where(ages > 0, -torch.inf, 0.0)
    found = run(AverageConfig(kind="ema", decay=decay), path)
    torch.testing.assert_close(found, weighted(logs, path), rtol=1e-12, atol=1e-12)


@given(beta=BETAS, steps=st.integers(1, 300))
def test_beta_weights_are_symmetric_and_with_one_alike(beta: float, steps: int) -> None:
    weights = [beta_density(beta, k, steps) for k in range(steps + 1)]
    assert weights == weights[::-1]
    assert beta != 1 or set(weights) == {1.0}


@pytest.mark.parametrize(("beta", "share"), [(0.5, 0.39), (0.1, 0.63)])
def test_a_beta_below_one_has_most_of_its_weight_at_both_ends(beta: float, share: float) -> None:
    weights = [beta_density(beta, k, 200) for k in range(201)]
    ends = sum(weights[:20]) + sum(weights[-20:])
    assert ends / sum(weights) == pytest.approx(share, abs=0.02)


def test_what_does_not_move_is_its_own_average_and_whole_numbers_have_none() -> None:
    weight, count = torch.randn(5, generator=torch.Generator().manual_seed(0)), torch.zeros(()).long()
    average = Average(AverageConfig(kind="beta", beta=0.5), "one", {"w": weight, "count": count}, 50)
    for _ in range(50):
        count += 1
        average.add()
    assert average.averages.keys() == {"w"} and torch.equal(average.averages["w"], weight.double())
    average.adopt()
    assert int(count) == 50


@pytest.mark.parametrize("kind", ["beta", "ema"])
@pytest.mark.parametrize("stop", [0, 1, 17, 40])
def test_one_that_goes_on_in_the_middle_ends_with_the_same_bits(kind: str, stop: int) -> None:
    config, path = AverageConfig(kind=kind, beta=0.3, decay=0.9), walk(40, 3)  # type: ignore[arg-type]
    weight = path[0].clone()
    first = Average(config, "one", {"w": weight}, 40)
    for now in path[1 : stop + 1]:
        weight.copy_(now)
        first.add()
    second = Average(config, "one", {"w": weight}, 40)
    second.averages["w"].copy_(first.averages["w"])
    second.restore(first.state())
    for now in path[stop + 1 :]:
        weight.copy_(now)
        second.add()
    assert torch.equal(second.averages["w"], run(config, path, 40)) and second.missing == 0


def test_more_steps_than_were_foreseen_and_another_rule_are_refused() -> None:
    config = AverageConfig(kind="beta")
    average = Average(config, "warm", {"w": torch.zeros(2)}, 1)
    average.add()
    with pytest.raises(ConfigError, match=r"phase warm: its average was to be over 1 steps.*phases.steps"):
        average.add()
    with pytest.raises(ConfigError, match=r"phase warm: its average began with steps = 1, now it is 2"):
        Average(config, "warm", {"w": torch.zeros(2)}, 2).restore(average.state())
    with pytest.raises(ConfigError, match=r"phase warm: average.kind = .beta. must know the number of steps"):
        Average(config, "warm", {"w": torch.zeros(2)})


@settings(max_examples=50, deadline=None)
@given(beta=BETAS, steps=st.integers(1, 40), seed=st.integers(0, 99))
def test_rows_that_seldom_change_have_the_average_of_all_rows_at_all_steps(
    beta: float, steps: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    table, weights = (
        torch.randn(9, 2, generator=random),
        [beta_density(beta, k, steps) for k in range(steps + 1)],
    )
    lazy, path = RowAverages(9, 2), [table.clone()]
    lazy.add(weights[0], torch.zeros(0, dtype=torch.int64), table[:0])
    for weight in weights[1:]:
        changed = torch.randperm(9, generator=random)[: int(torch.randint(0, 4, (), generator=random))]
        before = table[changed].clone()
        table[changed] += torch.randn(before.shape, generator=random)
        lazy.add(weight, changed, before)
        path.append(table.clone())
    expected = weighted(torch.tensor(weights, dtype=torch.float64).log(), path)
    found = lazy.averages(torch.arange(9), table)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def losses_of_next_windows(trend: float, wander: float, seed: int) -> tuple[float, float]:
    """Mean log loss on the window that follows, of the last weights and of their Beta average.

    A linear model is trained window after window. Of its 9 features 8 have a constant coefficient; the
    last one's moves from window to window by `trend`, and at random by `wander`.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731 - shorter, and named
    truth, model, steps = torch.cat([draw(8), torch.zeros(1)]), nn.Linear(9, 1, bias=False), 60
    model.weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    config, sums = AverageConfig(kind="beta", beta=0.5), [0.0, 0.0]
    for window in range(12):
        average = Average(config, "one", {"w": model.weight}, steps)
        for _ in range(steps):
            inputs = draw(64, 9)
            labels = torch.bernoulli((inputs @ truth).sigmoid(), generator=generator)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(inputs)[:, 0], labels).backward()
            optimizer.step()
            average.add()
        truth[8] += trend + wander * float(draw(1))
        inputs = draw(8192, 9)
        target = (inputs @ truth).sigmoid()
        for place, weight in enumerate((model.weight[0].detach(), average.averages["w"][0].float())):
            sums[place] += float(F.binary_cross_entropy_with_logits(inputs @ weight, target)) * (window >= 4)
    return sums[0] / 8, sums[1] / 8


def test_an_average_wins_where_a_nuisance_wanders_and_loses_where_the_signal_drifts() -> None:
    # It takes the noise of single steps away, and lags behind by half a window. So it wins as long as a
    # window's move is small beside that noise; a walk of 1.0 a window it loses, too.
    for seed in range(5):
        last, average = losses_of_next_windows(0.0, 0.3, seed)
        assert average < last
        last, average = losses_of_next_windows(0.5, 0.0, seed)
        assert last < average
