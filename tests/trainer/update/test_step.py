"""Schedules, the dense optimizer, and what a config may ask of a training step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizer

from embeddings.errors import ConfigError
from tests.helpers.launching import SETTINGS, overrides, tandemrec
from tests.helpers.logs import small_log
from trainer.config.sections import TrainConfig
from trainer.data.cursor import Cursor
from trainer.data.files import RowGroup
from trainer.data.reader import Step
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import load_config
from trainer.update.guard import Gradients, Guard, _listed, dense_norm
from trainer.update.schedule import Schedule, dense_schedule, table_schedule
from trainer.update.step import RateSetter, make_optimizer

DARE = Path(__file__).parents[3] / "configs" / "dare.toml"


def test_rates_warm_up_then_fall() -> None:
    assert [Schedule(4, "none").factor(step, 0.5) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear, cosine = Schedule(0, "linear"), Schedule(0, "cosine")
    assert [linear.factor(9, p) for p in (0, 0.25, 0.5, 1)] == [1, 0.75, 0.5, 1e-3]
    assert [cosine.factor(9, p) for p in (0, 0.5)] == [1, 0.5]
    assert cosine.factor(9, 0.25) == pytest.approx(0.5 + 0.5 * math.cos(math.pi / 4))
    assert cosine.factor(9, 1) == 1e-3
    assert Schedule(10, "cosine").factor(4, 0.5) == pytest.approx(0.25)


def test_tables_follow_the_dense_schedule_but_for_what_they_set() -> None:
    config = TrainConfig(warmup_steps=7, decay="cosine")
    assert table_schedule(config) == dense_schedule(config) == Schedule(7, "cosine")
    other = TrainConfig.model_validate({"warmup_steps": 7, "decay": "cosine", "tables": {"warmup_steps": 0}})
    assert (dense_schedule(other), table_schedule(other)) == (Schedule(7, "cosine"), Schedule(0, "cosine"))


class Fake(nn.Module):
    """Dense weights beside a fused optimizer of one group."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
        self.fused_optimizer = _Fused()


class _Fused(KeyedOptimizer):
    def __init__(self) -> None:
        super().__init__({}, {}, [{"params": [], "lr": 0.2}])
        self.steps = 0

    def step(self, closure: object = None) -> None:
        self.steps += 1


def test_tables_and_dense_weights_get_their_own_rates() -> None:
    model = Fake()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=0.01))
    rates = RateSetter(model, optimizer)
    for _ in range(2):
        rates.set(0.5, 0.1)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.005])
    assert model.fused_optimizer.steps == 2


@pytest.mark.parametrize("experts", [False, True])
def test_weight_decay_draws_matrices_only(experts: bool) -> None:
    """The biases of several experts are a matrix, and no more decayed than others."""
    model = Fake()
    if experts:
        model.bias = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = make_optimizer(model, TrainConfig(optimizer="adamw", weight_decay=0.5, learning_rate=0.1))
    assert torch.equal(model.matrix.detach(), torch.ones(2, 2))
    for parameter in (model.matrix, model.bias):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model.bias.detach(), torch.ones_like(model.bias))
    assert torch.allclose(model.matrix.detach(), torch.full((2, 2), 0.95))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["train.weight_decay=0.1"], 'set train.optimizer = "adamw"'),
        (["train.optimizer=adamw"], "adamw.* without train.weight_decay"),
        (["train.max_gradient_norm=-1"], "train.max_gradient_norm"),
        (["train.decay=exponential"], "train.decay"),
        (["train.precision=fp16"], "train.precision"),
        (["train.tables.learning_rate=1"], "unknown key 'train.tables.learning_rate'"),
    ],
)
def test_what_would_be_ignored_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(DARE, words)


def test_a_norm_that_overflows_is_no_alarm(tmp_path: Path) -> None:
    guard = Guard(Ranks(0, 1, 1, torch.device("cpu")), tmp_path)
    step = Step(None, True, Cursor())  # type: ignore[arg-type] # not looked at
    large = {"a": torch.tensor([3e30]), "b": torch.tensor([4e30])}
    with process_group():
        guard.judge(guard.check(1, step, Gradients(torch.zeros(()), large, large)))
        for wait in (True, False):
            assert float(dense_norm(list(large.values()), wait)) == pytest.approx(5e30)
        assert not list(tmp_path.iterdir())


def test_sources_are_listed_by_file() -> None:
    places = [RowGroup(Path("b"), 3), RowGroup(Path("a"), 10), RowGroup(Path("b"), 0)]
    assert _listed(places) == "a row group 10; b row groups 0, 3"


def test_bench_step_leaves_its_figures(tmp_path: Path) -> None:
    small = {"data.log": str(small_log(tmp_path / "log", users=6)), **SETTINGS}
    report = tmp_path / "step.json"
    words = ["bench", "step", "--config", str(DARE), "--repeats", "1", "--json", str(report)]
    done = tandemrec(*words, *overrides(small))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert set(found) >= {"ratios", "rows", "machine", "versions"}
    assert found["rows"][0]["name"] == "bare TorchRec loop"
    assert all(row["ms_a_step"] > 0 and row["cpu_ms_a_step"] > 0 for row in found["rows"])
    assert {"trainer_to_bare", "check_to_no_check", "sparse_dist_to_none"} <= set(found["ratios"])
