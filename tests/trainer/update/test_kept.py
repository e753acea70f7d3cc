"""Weights that are kept come back with the state of their optimizer, and training goes on from there."""

from __future__ import annotations

import torch

from tests.trainer.update.test_step import Fake
from tests.trainer.update.test_tied import Maps, train
from trainer.update.kept import KeptWeights


def test_what_is_kept_comes_back_to_the_bit() -> None:
    torch.manual_seed(1)
    maps = Maps(torch.nn.Linear(7, 5))
    norm = torch.nn.BatchNorm1d(3)
    kept = KeptWeights(list(maps.maps.parameters()), maps.dense, list(norm.buffers()))
    train(maps, None, range(4))
    kept.take()
    train(maps, None, range(4, 7))
    straight = [weight.detach().clone() for weight in maps.maps.parameters()]
    norm(torch.randn(9, 3))
    other = Fake().matrix
    kept.restore()
    assert float(norm.num_batches_tracked) == 0 and not norm.running_mean.any()
    assert not torch.equal(straight[0], maps.maps.weight)
    train(maps, None, range(4, 7))
    assert all(torch.equal(a, b) for a, b in zip(straight, maps.maps.parameters(), strict=True))
    assert torch.equal(maps.matrix, other)
