"""Maps of several domains that are held equal train as the one map of all candidates."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torchrec.optim.keyed import KeyedOptimizer

from tests.trainer.update.test_step import Fake
from trainer.config.sections import TrainConfig
from trainer.model.heads.grouped import DomainLinear
from trainer.model.ops.by_group import Groups
from trainer.update.step import make_optimizer
from trainer.update.tied import TiedMaps

DOMAINS, WIDTH, OUTPUTS = 3, 7, 5


class Maps(Fake):
    """The maps of domains, or one `nn.Linear`, and what trains them."""

    def __init__(self, maps: nn.Module) -> None:
        super().__init__()
        self.maps = maps
        self.optimizer = make_optimizer(self, TrainConfig(learning_rate=0.01))
        self.dense: KeyedOptimizer = dict(self.optimizer.optimizers)["dense"]


def drawn(seed: int) -> tuple[Tensor, Tensor, Groups]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(40, WIDTH, generator=random)
    # The last domain is in no batch.
    domain = torch.randint(0, DOMAINS - 1, (40,), generator=random)
    return x, torch.randn(40, OUTPUTS, generator=random), Groups(domain, DOMAINS)


def train(maps: Maps, tied: TiedMaps | None, steps: range) -> None:
    for step in steps:
        x, target, domain = drawn(step)
        maps.optimizer.zero_grad()
        out = maps.maps(x, domain) if tied else maps.maps(x)
        (out - target).square().mean().backward()
        if tied:
            tied.gather()
            for weight in maps.maps.parameters():
                assert not weight.grad[1:].any() and weight.grad[0].any()
        maps.optimizer.step()
        if tied:
            tied.spread()


def test_copies_are_equal_to_the_bit_and_train_as_one_map() -> None:
    torch.manual_seed(1)
    many, one = Maps(DomainLinear(DOMAINS, WIDTH, OUTPUTS)), Maps(nn.Linear(WIDTH, OUTPUTS))
    tied = TiedMaps(list(many.maps.parameters()), many.dense)
    assert tied.differ()
    first = deepcopy(many.maps)
    tied.spread()
    assert not tied.differ()
    for mine, before in zip(many.maps.parameters(), first.parameters(), strict=True):
        assert torch.equal(mine[2], before[0])
    with torch.no_grad():
        for single, of_domains in zip(one.maps.parameters(), many.maps.parameters(), strict=True):
            single.copy_(of_domains[0])
    train(many, tied, range(20))
    train(one, None, range(20))
    for single, of_domains in zip(one.maps.parameters(), many.maps.parameters(), strict=True):
        for domain in range(1, DOMAINS):
            assert torch.equal(of_domains[domain], of_domains[0])
        assert torch.allclose(of_domains[0], single, atol=1e-6)
        state, expected = many.dense.state[of_domains], one.dense.state[single]
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name][0], state[name][2])
            assert torch.allclose(state[name][0], expected[name], atol=1e-7)


@pytest.mark.parametrize("silent", ["no gradient", "frozen"])
def test_what_has_no_gradient_stays(silent: str) -> None:
    many = Maps(DomainLinear(DOMAINS, WIDTH, OUTPUTS))
    tied = TiedMaps(list(many.maps.parameters()), many.dense)
    tied.spread()
    before = deepcopy(many.maps)
    if silent == "frozen":
        many.maps.requires_grad_(False)
    tied.gather()
    many.optimizer.step()
    tied.spread()
    for mine, then in zip(many.maps.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, then)
