"""AdaTask where tasks own sets of tables, which losses of other tasks may reach as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.launching import ROOT
from tests.helpers.per_task import PER_TASK, PRODUCT, SMALL_EPS, differences, owned_sets, training
from tests.programs.preset_steps import small_config
from tests.trainer.test_presets import log_of_tasks
from trainer.config.tasks import TaskConfig, resolve_tasks
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("tasks") / "log")


@pytest.mark.parametrize(
    ("preset", "words", "lanes"),
    [
        ("stem", owned_sets("open"), {"click", "conversion", "shared"}),
        ("ple", owned_sets("hidden"), {"click", "conversion", "shared"}),
        # The product alone trains what belongs to its other factor.
        ("stem", PRODUCT, {"click", "shared"}),
    ],
    ids=["open", "stacked", "product"],
)
def test_the_size_of_a_loss_does_not_matter_to_sets_of_tasks(
    preset: str, words: list[str], lanes: set[str], log: Path, tmp_path: Path
) -> None:
    """Nor who owns them: each loss that reaches a set has a state of its own, and is watched."""
    found = []
    with process_group() as ranks:
        for times in (1, 1000):
            weights = [f"tasks.click.weight={1e6 * times}", "tasks.conversion.weight=1e6"]
            config = small_config(preset, log, PER_TASK, *words, *weights, *SMALL_EPS)
            made = training(config, ranks, tmp_path)
            list(made.steps(3))
            found.append(made.folded())
        shares = made.step.report()["dominance"]["mean"]
    assert max(differences(*found).values()) < 1e-4
    watched = {unit.split("/")[1]: of for unit, of in shares.items() if unit.endswith("/item_id")}
    assert watched.keys() == lanes
    for of in watched.values():
        assert of == {"click": pytest.approx(0.5, abs=0.2), "conversion": pytest.approx(0.5, abs=0.2)}


def test_lanes_are_of_the_tasks_that_some_phase_trains() -> None:
    def lanes(*words: str) -> tuple[str, ...]:
        tasks = {
            "a": TaskConfig(), "b": TaskConfig(weight=0), "c": TaskConfig(loss="none"),
            "both": TaskConfig(label="b", product=("a", "c")),
        }  # fmt: skip
        config = load_config(ROOT / "configs/mmoe.toml", words)
        assert not config.without_lanes().lanes(resolve_tasks(tasks, ["a", "b", "c"]))
        return config.lanes(resolve_tasks(tasks, ["a", "b", "c"]))

    assert lanes() == lanes("phases=[{passes=1}]") == ()
    assert lanes(PER_TASK) == ("a", "both")
    assert lanes(PER_TASK, 'phases=[{passes=1, update="summed"}]') == ()
    assert lanes('phases=[{passes=1}, {passes=1, update="per_task", weights={b=1}}]') == ("a", "b", "both")


def test_the_losses_of_a_set_are_those_that_reach_it() -> None:
    tasks = {
        "a": TaskConfig(), "b": TaskConfig(), "c": TaskConfig(loss="none"), "rests": TaskConfig(weight=0),
        "both": TaskConfig(label="b", product=("a", "c")),
    }  # fmt: skip

    def losses(preset: str, *words: str) -> dict[str, tuple[str, ...]]:
        config = load_config(ROOT / f"configs/{preset}.toml", words)
        resolved = resolve_tasks(tasks, ["a", "b", "c", "rests"])
        owners = ["shared", "domain:0", *(f"task:{task.name}" for task in resolved if task.has_tower)]
        return {owner: config.losses_of(resolved, owner) for owner in owners}

    every = ("a", "b", "both")
    shared = {"shared": every, "domain:0": every}
    apart = {"task:a": ("a", "both"), "task:b": ("b",), "task:c": ("both",), "task:rests": ()}
    mixed = dict.fromkeys(apart, every)
    assert losses("stem", PER_TASK) == {**shared, **apart}
    assert losses("stem", PER_TASK, "model.experts.foreign=hidden") == {**shared, **apart}
    assert losses("stem", PER_TASK, "model.experts.foreign=open") == {**shared, **mixed}
    assert losses("ple", PER_TASK) == {**shared, **mixed}
    assert not any(losses("stem").values())
