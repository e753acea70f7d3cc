"""AdaTask: lanes of tables and states of tasks against the rule written out, and what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.per_task import PER_TASK, Reference, training
from tests.programs.preset_steps import small_config
from tests.trainer.test_presets import log_of_tasks
from trainer.ranks.process_group import process_group


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("tasks") / "log")


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("mmoe", ()),
        ("mmoe", ("groups.representation.optimizer=adagrad", "groups.representation.fusion=sum")),
        ("stem", ("groups.attention.optimizer=sgd",)),
        ("esmm", ("model.attention_owner=click",)),
    ],
)
def test_lanes_and_states_follow_the_rule_written_out(
    preset: str, words: tuple[str, ...], log: Path, tmp_path: Path
) -> None:
    """Also where sets, towers and attention belong to a task, and where a task is a product."""
    config = small_config(preset, log, PER_TASK, *words)
    with process_group() as ranks:
        made = training(config, ranks, tmp_path)
        slow = Reference(config, made.folded())
        done = 0
        for step in made.steps(6):
            slow.train(step, config.train.learning_rate)
            done += 1
            found = made.folded()
            for name, weight in slow.named.items():
                assert torch.allclose(found[name], weight, rtol=1e-4, atol=2e-6), (done, name)
    assert done == 6
