"""What a run may change of its tasks between two starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import ConfigError
from trainer.checkpoint.same_tasks import check_same_tasks
from trainer.run_config import load_config

DARE = Path(__file__).parents[3] / "configs" / "dare.toml"
LABELS = ["click", "buy"]
CLICK, BUY = "tasks.click.weight=1", "tasks.buy.weight=1"
MASKED = "tasks.buy.mask=click == 1 and buy >= 0"


def differences(before: list[str], now: list[str]) -> list[str]:
    state: dict[str, Any] = {"config": load_config(DARE, before).model_dump(mode="json")}
    return check_same_tasks(state, load_config(DARE, now), LABELS)


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ([CLICK], [CLICK, BUY], "the tasks click, in this order, now they are click, buy; set"),
        ([CLICK, BUY], [BUY, CLICK], "the tasks click, buy, in this order, now they are buy, click"),
        ([], [CLICK], "the tasks click, buy, in this order, now they are click"),
        ([CLICK], [], "the tasks click, in this order, now they are click, buy"),
        (
            [CLICK, "tasks.buy.label=click"],
            [CLICK, BUY],
            "tasks.buy.label = 'click', now it is 'buy'; set it",
        ),
        ([CLICK, BUY], [CLICK, MASKED], "tasks.buy.mask = '', now it is 'click == 1 and buy >= 0'"),
        ([CLICK, MASKED], [CLICK, "tasks.buy.mask=click == 0 and buy >= 0"], "tasks.buy.mask = 'click == 1"),
        (
            [CLICK, BUY],
            ["tasks.click.rank=jrc", BUY],
            "rank = 'of one logit', now it is 'jrc'",
        ),
        (
            [CLICK, BUY, "tasks.both.label=buy", 'tasks.both.product=["click", "buy"]'],
            [CLICK, BUY, "tasks.both.label=buy"],
            "tasks.both.product = ('click', 'buy'), now it is ()",
        ),
        (["data.domain=band"], ["data.domain=city"], "data.domain = 'band', now it is 'city'"),
    ],
)
def test_other_tasks_are_refused(before: list[str], now: list[str], message: str) -> None:
    differences(before, before)
    with pytest.raises(ConfigError, match=f"^this run was started with .*{re.escape(message)}"):
        differences(before, now)


@pytest.mark.parametrize(
    "now",
    [
        ["tasks.click.weight=3", BUY],
        ["tasks.click.loss=focal", BUY],
        ["tasks.click.rank=pair", "tasks.click.bce_weight=0.9", "tasks.click.pairs=request", BUY],
        ["tasks.click.label=click", BUY],
        [CLICK, BUY, "data.domain=band"],
    ],
)
def test_how_they_are_trained_may_change(now: list[str]) -> None:
    # Single settings are said by `changed_settings`.
    assert differences([CLICK, BUY], now) == []


def test_a_mask_may_be_written_otherwise() -> None:
    assert differences([CLICK, MASKED], [CLICK, "tasks.buy.mask=(click==1.0) and (0 <= buy)"]) == []


def test_the_labels_of_the_log_may_be_spelled_out() -> None:
    assert differences([], [CLICK, "tasks.buy.weight=0.5"]) == ["tasks.click.weight = 1.0 (was 0.5)"]
    said = ["tasks.click.weight = 0.5 (was 1.0)", "tasks.buy.weight = 0.5 (was 1.0)"]
    assert differences([CLICK, BUY], []) == said


def test_towers_stay() -> None:
    tree = load_config(DARE, [CLICK]).model_dump(mode="json")
    tree["tasks"]["click"]["tower"] = [8]
    with pytest.raises(ConfigError, match=r"tasks\.click\.tower = \(8,\), now it is None"):
        check_same_tasks({"config": tree}, load_config(DARE, [CLICK]), LABELS)


def test_tasks_of_another_version_are_refused() -> None:
    tree = load_config(DARE, [CLICK]).model_dump(mode="json")
    tree["tasks"]["click"]["curve"] = 1
    with pytest.raises(ConfigError, match="tasks of another version"):
        check_same_tasks({"config": tree}, load_config(DARE, [CLICK]), LABELS)


def test_a_tower_that_is_spelled_out_is_the_same() -> None:
    with_towers = ["model.head=experts", "model.hidden=[8, 4]", CLICK, BUY]
    spelled = [*with_towers, "tasks.buy.tower=[8, 4]"]
    assert differences(with_towers, spelled) == differences(spelled, with_towers) == []
    with pytest.raises(ConfigError, match=r"tasks\.buy\.tower = \(8, 4\), now it is \(8,\)"):
        differences(with_towers, [*with_towers, "tasks.buy.tower=[8]"])
