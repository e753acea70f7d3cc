"""Phases of a run: their boundaries, what is frozen and reset in them, and going on inside any of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor

import pipelines.train
from embeddings.errors import CheckpointError, ConfigError
from tests.helpers.launching import SETTINGS, losses, tandemrec
from tests.helpers.logs import small_log
from tests.trainer.test_ranks import parameters_of
from trainer.checkpoint import save_load
from trainer.checkpoint.files import checkpoints, read_state
from trainer.checkpoint.tensors import TensorReader
from trainer.config.phases import PhaseConfig
from trainer.data.cursor import Cursor
from trainer.loop.phases import phases_of
from trainer.loop.position import Position
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config
from trainer.update.parts import Parts

CONFIG = Path("configs/dare.toml")
TABLE = "collections.{0}.embedding_bags.{0}__item_id.weight"


def config(log: Path, *phases: Mapping[str, Any], **changes: Any) -> Config:
    given = {**SETTINGS, "data.log": str(log), "phases": list(phases), "checkpoint.every_steps": 1}
    given |= {"checkpoint.keep": 100, **{name.replace("__", "."): value for name, value in changes.items()}}
    base = load_config(
        CONFIG, [f"{key}={json.dumps(value)}" for key, value in given.items() if key != "phases"]
    )
    return Config.model_validate({**base.model_dump(), "phases": given["phases"]})


def run(folder: Path, settings: Config) -> Path:
    with process_group() as ranks:
        pipelines.train.run(settings, folder, ranks)
    return folder


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("phases") / "log", seed=1)


def at(run_: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without what counts steps."""
    found = {}
    for path in checkpoints(run_ / "checkpoints"):
        if int(path.name[-8:]) == step:
            found = parameters_of(path)
    assert found
    return found


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor], part: str = "") -> bool:
    names = [name for name in before if part in name]
    assert names and before.keys() == after.keys()
    return all(torch.equal(before[name], after[name]) for name in names)


def lines(run_: Path, split: str = "train") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run_ / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def test_boundaries_that_change_nothing_change_no_bit(log: Path, tmp_path: Path) -> None:
    """Two phases of one schedule are the run that has them in one, inside a pass and between two."""
    flat = {"decay": "none", "warmup_steps": 0}
    plain = run(
        tmp_path / "plain", config(log, train__epochs=2, **{f"train__{k}": v for k, v in flat.items()})
    )
    steps = max(line["step"] for line in lines(plain))
    cut = run(
        tmp_path / "cut",
        config(log, {"steps": 3, **flat}, {"steps": steps - 3, **flat, "name": "rest"}),
    )
    assert same(at(plain, 3), at(cut, 3)) and same(at(plain, steps), at(cut, steps))
    assert [line["loss"] for line in lines(plain)] == [line["loss"] for line in lines(cut)]
    assert {line["phase"] for line in lines(cut)} == {"phase1", "rest"}


PHASES: tuple[dict[str, Any], ...] = (
    {"steps": 3},
    {"steps": 3, "freeze": ["tables"], "name": "head", "learning_rate": 0.01},
    {"passes": 1, "reset": ["groups.attention", "head"], "freeze": ["groups.representation"]},
    {
        "steps": 2,
        "train": ["groups.attention"],
        "reset_state": ["tables"],
        "table_learning_rates": {"attention": 0.5},
    },
)


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", config(log, *PHASES))


def test_what_is_frozen_neither_moves_nor_grows_state(whole: Path) -> None:
    """Neither do dense weights nor their moments, nor the count of their steps."""
    assert not same(at(whole, 1), at(whole, 3), TABLE.format("attention"))
    for group in ("attention", "representation"):
        assert same(at(whole, 3), at(whole, 6), f"collections.{group}")
    assert not same(at(whole, 3), at(whole, 6), "head")
    last = max(line["step"] for line in lines(whole))
    assert same(at(whole, 7), at(whole, last - 2), "collections.representation")
    assert not same(at(whole, 7), at(whole, last - 2), "collections.attention")
    final = [at(whole, last - 1), at(whole, last)]
    assert not same(*final, "collections.attention") and same(*final, "collections.representation.")
    dense = [
        name for name in final[0] if name.startswith(("optim.state.dense", "model.head", "model.branches"))
    ]
    assert len(dense) > 10 and all(torch.equal(final[0][name], final[1][name]) for name in dense)


def test_a_run_goes_on_inside_any_phase_to_the_bit(log: Path, whole: Path, tmp_path: Path) -> None:
    last = max(line["step"] for line in lines(whole))
    for step in range(1, last):
        settings = config(log, *PHASES, train__max_steps=step)
        if step in (1, 3, 4, 6, 7, last - 2, last - 1):
            cut = run(tmp_path / "cut", settings)
    assert same(at(run(cut, config(log, *PHASES)), last), at(whole, last))
    assert [line["loss"] for line in lines(cut)] == [line["loss"] for line in lines(whole)]


def test_a_pipeline_that_reads_ahead_trains_phases_to_the_same_bits(
    log: Path, whole: Path, tmp_path: Path
) -> None:
    """It takes the model anew where that was wrapped anew, and nothing is read beyond a phase."""
    ahead = run(
        tmp_path / "run", config(log, *PHASES, train__pipeline="sparse_dist", checkpoint__every_steps=0)
    )
    last = max(line["step"] for line in lines(whole))
    assert same(at(ahead, last), at(whole, last))


def test_a_reset_draws_new_weights_and_forgets_state_once(log: Path, whole: Path) -> None:
    """The rows are those of a seed of the phase, and what is not named keeps its bits."""
    before, after = at(whole, 6), at(whole, 7)
    row = (before[f"model.{TABLE.format('attention')}"] - after[f"model.{TABLE.format('attention')}"]).abs()
    # One step moves a row by no more than the learning rate times the root of its width.
    assert float(row.amax()) > 0.01 and not same(before, after, "head")
    sums = [name for name in after if name.startswith("optim") and "attention__item_id.momentum1" in name]
    (name,) = sums
    # A row that is looked up once has one gradient in its accumulator.
    assert float(after[name].sum()) < float(before[name].sum()) and float(after[name].sum()) > 0


def test_a_phase_that_stops_early_hands_its_best_weights_on(log: Path, tmp_path: Path) -> None:
    """No gain is large enough: the first validation, after step 2, stays the best, and step 4 is the end.

    A start that stood between the two phases goes on to the same bits.
    """
    stopping = {"patience": 1, "min_delta": 1.0}
    phases = ({"passes": 3, "early_stopping": stopping}, {"steps": 2, "freeze": ["tables"]})
    given: dict[str, Any] = {"train__validate_every": 2, "checkpoint__keep": 1}
    done = run(tmp_path / "run", config(log, *phases, **given))
    assert [line["step"] for line in lines(done, "validation")] == [2, 4, 6]
    cut = run(tmp_path / "cut", config(log, *phases, **given, train__max_steps=4))
    first, last = at(cut, 2), at(cut, 4)
    assert same(first, at(done, 6), "collections.") and not same(first, last, "collections.")
    assert same(at(run(cut, config(log, *phases, **given)), 6), at(done, 6))


def test_learning_rates_start_again_with_each_phase(whole: Path) -> None:
    """Every phase has the schedule of a run as long as it is; lines tell of the step to come."""
    factors: dict[str, list[float]] = {}
    for line in lines(whole):
        factors.setdefault(line["phase"], []).append(line["rate_factor"])
    assert list(factors) == ["phase1", "head", "phase3", "phase4"]
    assert factors["phase1"] == factors["head"] == pytest.approx([2 / 3, 1 / 3, 1e-3])
    assert factors["phase4"] == pytest.approx([1 / 2, 1e-3])
    assert factors["phase3"][0] > 0.5 > factors["phase3"][-1]


def test_values_and_mistakes(log: Path) -> None:
    def names(*phases: Mapping[str, Any], domains: tuple[int, ...] = (), **changes: Any) -> list[str]:
        return [phase.name for phase in phases_of(config(log, *phases, **changes), domains)]

    (only,) = phases_of(config(log))
    assert (only.name, only.train) == ("", config(log).train)
    assert names({"steps": 1}, {"name": "a", "passes": 1, "repeat": 2}) == ["phase1", "a_1", "a_2"]
    each = {"name": "a", "passes": 1, "each": "domain"}
    assert names(each, domains=(0, 4), data__domain="category_id") == ["a_domain0", "a_domain4"]
    for wrong, said in (
        ({"steps": 1, "passes": 1}, "either passes or steps"),
        ({"steps": 1, "freeze": ["head"], "train": ["head"]}, "give one of them"),
        ({"passes": 1, "average": {"kind": "beta"}}, "set steps instead"),
        ({"steps": 1, "fork": {"every": 1, "branches": [{"name": "a"}]}}, "two branches"),
    ):
        with pytest.raises(ValueError, match=said):
            PhaseConfig.model_validate(wrong)
    for phases, changes, said in (
        ([{"steps": 1}], {"train__epochs": 2}, "phases.0.passes"),
        ([{"steps": 1, "domains": [1]}], {}, "data.domain"),
        ([{"steps": 1, "table_learning_rates": {"x": 1.0}}], {}, "table_learning_rates names 'x'"),
        ([{"steps": 1, "name": "a"}, {"steps": 1, "name": "a"}], {}, "another phase is called that"),
        ([{"steps": 1, "early_stopping": {"patience": 1}}], {}, "validate_every"),
    ):
        with pytest.raises(ConfigError, match=said):
            phases_of(config(log, *phases, **changes))


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ({"freeze": ["tabels"]}, "did you mean 'tables'"),
        ({"reset": ["groups.other"]}, "no part of the model"),
        ({"freeze": ["tables", "dense"]}, "nothing would be trained"),
        ({"weights": {"buy": 1.0}}, "no task is called 'buy'"),
        ({"weights": {"click": 0.0}}, "nothing is trained"),
        ({"split": "other"}, "no candidates in that split"),
    ],
)
def test_a_phase_that_does_not_fit_is_refused_before_the_first_step(
    log: Path, tmp_path: Path, phase: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "run", config(log, {"steps": 1}, {"steps": 1, **phase}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_other_phases_are_refused_where_they_change_the_present_one(
    log: Path, whole: Path, tmp_path: Path
) -> None:
    cut = run(tmp_path / "cut", config(log, *PHASES, train__max_steps=4))
    with pytest.raises(ConfigError, match="stands in the phase 'head', phase 2"):
        run(cut, config(log, PHASES[0]))
    with pytest.raises(ConfigError, match="phases are now none"):
        run(cut, config(log))


def test_a_phase_begins_where_its_data_allow() -> None:
    """A phase of steps goes on in the pass of the one before; one of passes, or of other data, not."""
    settings = [{"steps": 3}, {"steps": 3}, {"passes": 1}, {"steps": 1, "split": "validation"}]
    phases = phases_of(Config.model_validate({"phases": settings}))
    inside, between = Cursor(0, 2, 5), Cursor(0, 3)
    assert phases[1].first_cursor(phases[0], inside) == inside
    assert phases[2].first_cursor(phases[1], inside) == phases[3].first_cursor(phases[2], inside) == between
    assert phases[2].first_cursor(phases[1], between) == between
    position = Position(step=3, cursor=inside, candidates=7)
    position.begin(phases[1], phases[0])
    assert asdict(position.began) == {"step": 3, "epoch": 2, "candidates": 7}
    assert position.ends(phases[1], 0) == [6] and position.ends(phases[1], 5) == [6, 5]


def test_words_name_parts() -> None:
    whole = Parts(frozenset({"a", "b"}), frozenset({"head.towers.x.weight", "head.gate.weight", "search.w"}))
    assert Parts.of(["groups.a"], whole, "") == Parts(frozenset({"a"}))
    assert Parts.of(["head.towers", "search"], whole, "").dense == {"head.towers.x.weight", "search.w"}
    assert Parts.of(["head.*.weight"], whole, "").dense == {"head.gate.weight"}
    assert Parts.of(["head.towers.*", "*.towers"], whole, "").dense == {"head.towers.x.weight"}
    assert Parts.of(["tables", "dense"], whole, "") == whole and not Parts.of([], whole, "")
    with pytest.raises(ConfigError, match=r"parts are tables, groups.a, groups.b, dense, head, head.gate"):
        Parts.of(["zzz"], whole, "phases.0.freeze")


def test_several_ranks_train_phases_as_one(log: Path, tmp_path: Path) -> None:
    """Freezing wraps the model anew, which every rank must do; resets do not depend on the sharding."""
    file = tmp_path / "phases.toml"
    settings = config(log, *PHASES[:3], data__batch_candidates=48, checkpoint__every_steps=0)
    file.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
    found = []
    for ranks in (1, 3):
        out = tmp_path / f"run{ranks}"
        done = tandemrec("train", "--config", str(file), "--out", str(out), ranks=ranks)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(losses(out))
    one, three = found
    assert len(one) == len(three) > 6 and one == pytest.approx(three, rel=1e-4)


def test_no_delta_builds_on_what_was_saved_before_a_reset(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save in the background is over only once the next one asks: what follows it was reset meanwhile."""
    # A delta of this small log always pays.
    monkeypatch.setattr("trainer.checkpoint.background._MOST", 100.0)
    phases = ({"steps": 3}, {"steps": 3, "reset": ["groups.attention"]})
    tensors, bases = [], []
    for mode in ("sync", "async"):
        settings = config(log, *phases, checkpoint__mode=mode, checkpoint__full_every=10)
        path = run(tmp_path / mode, settings) / "checkpoints"
        readers = [TensorReader(path / f"step-{step:08d}") for step in (3, 4, 6)]
        tensors.append([{name: each.whole(name) for name in each.names()} for each in readers])
        states = [read_state(path / f"step-{step:08d}") for step in (3, 4, 6)]
        bases.append(["base" in state for state in states])
    assert bases == [[True, False, True]] * 2
    for one, other in zip(*tensors, strict=True):
        assert same(one, other)


def test_the_best_weights_are_saved_however_the_last_phase_ends(log: Path, tmp_path: Path) -> None:
    """By a stop after its last step, and by `train.max_steps` at the end of its pass."""
    stopping = {"patience": 9, "min_delta": 1.0}
    phases = ({"steps": 2}, {"passes": 1, "train": ["head"], "early_stopping": stopping})
    given: dict[str, Any] = {"train__validate_every": 2, "checkpoint__every_steps": 0}
    plain = run(tmp_path / "plain", config(log, *phases, **given))
    last = max(line["step"] for line in lines(plain))
    limited = run(tmp_path / "limited", config(log, *phases, **given, train__max_steps=last))
    assert same(at(limited, last), at(plain, last))
    stopped = config(log, *phases, **given)

    def stop(step: int) -> None:
        if step == last - 1:
            signal.raise_signal(signal.SIGTERM)

    with process_group() as ranks:
        pipelines.train.run(stopped, tmp_path / "stopped", ranks, stop)
    assert same(at(run(tmp_path / "stopped", stopped), last), at(plain, last))


def test_a_best_checkpoint_that_could_not_be_saved_is_told_of(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With `on_error = "continue"` the next phase starts from the last weights."""
    phases = ({"passes": 3, "early_stopping": {"patience": 1, "min_delta": 1.0}}, {"steps": 1})
    given = {"train__validate_every": 2, "checkpoint__every_steps": 0, "checkpoint__on_error": "continue"}
    save = save_load.save

    def failing(folder: Path, step: int, *rest: Any, **named: Any) -> Path:
        if step == 2:
            raise CheckpointError(folder, "no room")
        return save(folder, step, *rest, **named)

    monkeypatch.setattr("trainer.checkpoint.save_load.save", failing)
    done = run(tmp_path / "run", config(log, *phases, **given))
    assert "ends with its last weights; its best weights, of step 2, were not saved" in capfd.readouterr().out
    assert max(line["step"] for line in lines(done)) == 5
