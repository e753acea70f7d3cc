"""The dense optimizer against torch's own on the same gradients: from the start, resumed, warm-started."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pipelines.train
from tests.helpers.launching import SETTINGS, launched, overrides
from tests.helpers.logs import small_log
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.update.step import TrainStep

KINDS = {"adam": {}, "adamw": {"train.optimizer": "adamw", "train.weight_decay": 0.3}}


@dataclass
class Beside:
    """torch.optim's Adam, given the gradients and rates of a run's steps.

    Attributes:
        step: whose dense weights are followed; weights: the copies that torch updates; steps: done.
    """

    step: TrainStep
    weights: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    steps: int = 0

    @staticmethod
    def of(step: TrainStep, before: Beside | None) -> Beside:
        weights = {name: weight.detach().clone() for name, weight in step._dense.items()}
        decay = step._config.weight_decay
        matrices = [w for w in weights.values() if w.dim() > 1]
        others = [w for w in weights.values() if w.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        made = torch.optim.AdamW if decay else torch.optim.Adam
        beside = Beside(step, weights, made(groups))
        if before is not None:
            beside.optimizer.load_state_dict(before.optimizer.state_dict())
        return beside

    def follow(self) -> None:
        """Take the step that the run has just taken; both must stand at the same weights after it."""
        dense = self.step._dense
        for name, copy in self.weights.items():
            copy.grad = None if dense[name].grad is None else dense[name].grad.clone()
        rates = {group["lr"] for group in self.step._optimizer._optims[1][1].param_groups}
        for group in self.optimizer.param_groups:
            (group["lr"],) = rates
        before = {name: copy.clone() for name, copy in self.weights.items()}
        self.optimizer.step()
        self.steps += 1
        moved = 0.0
        for name, copy in self.weights.items():
            moved = max(moved, float((copy - before[name]).abs().max()))
            torch.testing.assert_close(dense[name].detach(), copy, rtol=1e-6, atol=1e-8, msg=name)
        assert moved > 1e-4


def followed(patch: pytest.MonkeyPatch, before: Beside | None = None) -> list[Beside]:
    """From now on, steps are followed; what follows them is in the list after the first one."""
    found: list[Beside] = []
    own = TrainStep.step, TrainStep.zero_grad

    def zero_grad(self: TrainStep) -> None:
        own[1](self)
        if not found:
            found.append(Beside.of(self, before))

    def step(self: TrainStep) -> None:
        own[0](self)
        found[0].follow()

    patch.setattr(TrainStep, "step", step)
    patch.setattr(TrainStep, "zero_grad", zero_grad)
    return found


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("adam") / "log", seed=1)


def config(log: Path, **changes: Any) -> Config:
    words = {
        **SETTINGS,
        "data.log": str(log),
        "train.learning_rate": 0.01,
        "train.max_steps": 4,
        "train.epochs": 9,
        **changes,
    }
    return load_config(Path("configs/dare.toml"), overrides(words)[1::2])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


@pytest.mark.parametrize("kind", KINDS)
def test_dense_weights_move_as_by_torchs_own_optimizer(
    kind: str, log: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From nothing, after a resume with the moments so far, and warm-started, where it starts anew."""
    first = followed(monkeypatch)
    pipelines.train.run(config(log, **KINDS[kind]), tmp_path / "run", ranks)
    assert first[0].steps == 4
    monkeypatch.undo()
    resumed = followed(monkeypatch, first[0])
    pipelines.train.run(config(log, **KINDS[kind], **{"train.max_steps": 7}), tmp_path / "run", ranks)
    assert resumed[0].steps == 3
    monkeypatch.undo()
    warm = followed(monkeypatch)
    start = {"train.init_from": str(tmp_path / "run")}
    shutil.copytree(log, tmp_path / "log")
    pipelines.train.run(config(tmp_path / "log", **KINDS[kind], **start), tmp_path / "new", ranks)
    assert warm[0].steps == 4
    assert not torch.equal(*(next(iter(each[0].weights.values())) for each in (first, warm)))


def test_dense_weights_move_alike_on_two_ranks(log: Path, tmp_path: Path) -> None:
    done = launched("tests.trainer.update.test_dense_adam", str(log), str(tmp_path / "run"), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 steps on 2 ranks" in done.stdout


def main(log: Path, run: Path) -> None:
    """A run on every rank, each of which follows its own steps."""
    with process_group(60) as ranks, pytest.MonkeyPatch.context() as patch:
        found = followed(patch)
        pipelines.train.run(config(log), run, ranks)
        if ranks.speaks:
            print(f"{found[0].steps} steps on {ranks.world_size} ranks")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
