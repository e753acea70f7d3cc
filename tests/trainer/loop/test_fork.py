"""Branches of a phase: what each trains, how they are merged, and going on inside any of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import pipelines.train
import trainer.loop.fork
from embeddings.errors import ConfigError, TandemError
from embeddings.lookup.before_change import combined
from tests.helpers.launching import SETTINGS, overrides, reported
from tests.helpers.logs import IN_PART, enrich, observed_in_part, random_rows, write_log
from tests.trainer.loop.test_phases import lines, same
from trainer.checkpoint.files import checkpoints, read_state
from trainer.checkpoint.save_load import ResumePoint
from trainer.checkpoint.tensors import TensorReader
from trainer.loop.shares import Choice, Shares, one_hot
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config

TASKS = {"tasks.bought.label": "buy", "tasks.click.weight": 2.0}
FLAT = {"decay": "none", "warmup_steps": 0}
ALONE, BOTH = {"weights": {"click": 0.0}}, {"weights": {}}
BRANCHES = [{"name": "target", **ALONE}, {"name": "both", **BOTH}]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = observed_in_part(enrich(random_rows(8), 8), 8)
    path = tmp_path_factory.mktemp("fork") / "log"
    write_log(path, {"train": rows, "validation": rows[:6], "test": rows[6:]}, rich=True, **IN_PART)
    return path


def config(log: Path, *phases: Mapping[str, Any], **changes: Any) -> Config:
    given = {**SETTINGS, "data.log": str(log), "checkpoint.every_steps": 1, "checkpoint.keep": 100}
    given |= {"data.domain": "city", "tables.item_id.rows": 4000, **TASKS} | {
        k.replace("__", "."): v for k, v in changes.items()
    }
    base = load_config(Path("configs/dare.toml"), overrides(given)[1::2])
    return Config.model_validate({**base.model_dump(), "phases": list(phases)})


def run(folder: Path, settings: Config) -> Path:
    with process_group() as ranks:
        pipelines.train.run(settings, folder, ranks)
    return folder


def at(run_: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whatever it builds on."""
    (path,) = [path for path in checkpoints(run_ / "checkpoints") if int(path.name[-8:]) == step]
    reader = TensorReader(path)
    return {name: reader.whole(name) for name in reader.saved_names()}


def forked(branches: list[dict[str, Any]] = BRANCHES, steps: int = 4, **fork: Any) -> list[dict[str, Any]]:
    """A step, rounds of branches, and two more steps."""
    given = {"branches": branches, "every": 2, "task": "bought", "metric": "logloss", **fork}
    return [{"steps": 1, **FLAT}, {"steps": steps, **FLAT, "fork": given}, {"steps": 2, **FLAT}]


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", config(log, *forked()))


def chosen(monkeypatch: pytest.MonkeyPatch, *shares: float) -> None:
    """Have every merge take these shares, whatever validation says."""

    def choose(value_of: Callable[[Shares], float], branches: int, grid: Sequence[float]) -> Choice:
        alone = {one_hot(place, branches): 0.0 for place in range(branches)}
        return Choice(shares, {**alone, shares: value_of(shares)})

    monkeypatch.setattr(trainer.loop.fork, "search", choose)


def test_branches_train_what_phases_of_their_weights_would(
    log: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each from the weights at the fork and the same place in the data; the merge is that of whole tables."""
    ends = []
    for place, of in enumerate((ALONE, BOTH)):
        plain = run(tmp_path / str(place), config(log, {"steps": 1, **FLAT}, {"steps": 2, **FLAT, **of}))
        # Of the forked run, a step inside the branch; after its last one all is as at the fork again.
        assert same(at(plain, 2), at(whole, 2 + 2 * place))
        ends.append(at(plain, 3))
    assert same(at(whole, 1), at(whole, 3))
    (merge, *_) = lines(whole, "merge")
    found = merge["lambda"]["target"], merge["lambda"]["both"]
    assert merge["step"] == 5 and merge["round"] == 1
    chosen(monkeypatch, 0.7, 0.3)
    mixed = run(tmp_path / "mixed", config(log, *forked()))
    for shares, merged in ((found, at(whole, 5)), ((0.7, 0.3), at(mixed, 5))):
        for name, tensor in merged.items():
            values = [end[name] for end in ends]
            # Steps are counted, not averaged: the tower of a silent task has taken fewer.
            assert torch.equal(tensor, values[1] if name.endswith(".step") else combined(values, shares)), (
                name
            )


def test_the_search_is_told_and_takes_what_validation_likes_best(whole: Path) -> None:
    merges, validations = lines(whole, "merge"), {line["step"]: line for line in lines(whole, "validation")}
    assert [merge["step"] for merge in merges] == [5, 9]
    for merge in merges:
        values = [each["logloss"] for each in merge["tried"]]
        assert len(values) == 6 and merge["logloss"] == min(values)
        assert validations[merge["step"]]["tasks"]["bought"]["logloss"] == merge["logloss"]
    trained = [(line["step"], line.get("round"), line.get("branch")) for line in lines(whole)]
    rounds = [(1, "target"), (1, "target"), (1, "both"), (1, "both")]
    expected = [(None, None), *rounds, *((2, name) for _, name in rounds), (None, None), (None, None)]
    assert trained == [(step, *each) for step, each in enumerate(expected, 1)]
    drawn = ElementTree.parse(whole / "lambda.svg").getroot()
    titles = [each.text for each in drawn.iter() if each.tag.endswith("title")]
    assert [title for title in titles if title] == [
        f"step {merge['step']}: {share:g} {name}"
        for merge in merges
        for name, share in merge["lambda"].items()
        if share
    ]


@pytest.mark.parametrize("rule", ["summed", "per_task"])
def test_equal_branches_are_one_to_the_bit(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str
) -> None:
    """Whatever their shares; a branch counts once for the length of the phase and its schedule."""
    chosen(monkeypatch, 0.3, 0.6, 0.1)
    shape = {"decay": "linear", "warmup_steps": 2}
    equal = [{"name": name} for name in ("a", "b", "c")]
    phases = [{"passes": 1, "name": "one", "update": rule, **shape}]
    plain = run(tmp_path / "plain", config(log, *phases))
    fork = {"branches": equal, "every": 3, "task": "bought"}
    forked_ = run(tmp_path / "forked", config(log, {**phases[0], "fork": fork}))
    steps = max(line["step"] for line in lines(plain))
    assert steps % 3 and same(at(plain, steps), at(forked_, 3 * steps))
    assert lines(forked_)[-1]["samples"] == 3 * lines(plain)[-1]["samples"]
    factors = [line["rate_factor"] for line in lines(plain)]
    assert [line["rate_factor"] for line in lines(forked_) if line["branch"] == "c"] == factors


def test_a_run_goes_on_inside_any_branch_to_the_bit(log: Path, whole: Path, tmp_path: Path) -> None:
    """Also from incremental checkpoints, which must know of rows that were put back or merged."""
    last = max(line["step"] for line in lines(whole))
    deltas = {"checkpoint__full_every": 4, "train__validate_every": 2}
    # Inside a branch, between two, after the merge, and inside the last branch of all.
    for step in (2, 3, 5, 8, 0):
        cut = run(tmp_path / "cut", config(log, *forked(), train__max_steps=step, **deltas))
    for step in range(1, last + 1):
        assert same(at(cut, step), at(whole, step)), step
    assert lines(cut, "merge") == lines(whole, "merge")
    assert (cut / "lambda.svg").read_text() == (whole / "lambda.svg").read_text()
    bases = [read_state(path).get("base") for path in checkpoints(cut / "checkpoints")]
    assert any(bases)
    # Whoever uses the newest of a run that was cut is told where it stands.
    stands = {
        path.name: ResumePoint(path, read_state(path), []).lines for path in checkpoints(cut / "checkpoints")
    }
    told = {int(name[-8:]): lines_ for name, lines_ in stands.items() if lines_}
    assert sorted(told) == [2, 3, 4, 6, 7, 8]
    assert told[4] == [
        "checkpoint step-00000004 stands inside the branch both: its weights are those of this branch alone, "
        "before the merge"
    ]
    names = [{file.name for file in path.iterdir()} for path in checkpoints(cut / "checkpoints")]
    assert sum("fork-dense.safetensors" in each for each in names) == 6


def test_scope_dense_leaves_the_tables_to_the_first_branch(log: Path, tmp_path: Path) -> None:
    dense = run(tmp_path / "dense", config(log, *forked(scope="dense", steps=2)))
    assert not same(at(dense, 1), at(dense, 3), "collections.")
    assert same(at(dense, 3), at(dense, 5), "collections.")
    assert same(at(dense, 1), at(dense, 3), "model.head") and not same(
        at(dense, 3), at(dense, 5), "model.head"
    )


def test_the_best_branches_go_on_after_the_first_merge(log: Path, tmp_path: Path) -> None:
    branches = [*BRANCHES, {"name": "third", "weights": {"click": 9.0}, "domains": [1, 2]}]
    kept = run(tmp_path / "kept", config(log, *forked(branches, keep=2, domain=1)))
    first, second = lines(kept, "merge")
    assert [*first["lambda"]] == ["target", "both", "third"]
    alone = {
        name: each["logloss"]
        for each in first["tried"]
        for name, share in each["lambda"].items()
        if share == 1
    }
    assert [*second["lambda"]] == ["target", min(("both", "third"), key=lambda name: alone[name])]
    validations = {line["step"]: line for line in lines(kept, "validation")}
    for merge in (first, second):
        own = validations[merge["step"]]["by_domain"]["1"]["tasks"]["bought"]
        assert own["logloss"] == merge["logloss"]
    trained = [line["branch"] for line in lines(kept) if "branch" in line]
    rounds = ["target", "both", "third", *second["lambda"]]
    assert trained == [name for name in rounds for _ in range(2)]


def test_a_killed_run_ends_with_the_same_bits_and_another_number_of_ranks_goes_on(tmp_path: Path) -> None:
    """SIGKILL before random steps, writes and measurements of a run of three branches; see the script."""
    report = reported("tests.programs.fork_runs", tmp_path)
    assert len(report["merges"]) == 2
    for kill in report["kills"]:
        assert kill["codes"] == [-signal.SIGKILL] and kill["again"] == [0] and kill["same"], kill
    # Two ranks in the middle of a branch, and then one.
    assert report["moved"]["codes"] == [0, 0, 0] and report["moved"]["far"] < 1e-5


@pytest.mark.parametrize(
    ("fork", "problem"),
    [
        ({"task": "sold"}, "fork.task.*sold.*bought, click"),
        (
            {"branches": [{"name": "a"}, {"name": "b", "weights": {"sold": 1}}]},
            "branches.1.weights names 'sold'",
        ),
        (
            {"branches": [{"name": "a"}, {"name": "b", "weights": {"bought": 0, "click": 0}}]},
            "nothing is trained",
        ),
        ({"domain": 77, "metric": "auc"}, "domain = 77: the validation split has no candidate"),
    ],
)
def test_what_cannot_be_is_refused(log: Path, tmp_path: Path, fork: dict[str, Any], problem: str) -> None:
    with pytest.raises(TandemError, match=problem):
        run(tmp_path / "run", config(log, *forked(**{"branches": BRANCHES, **fork})))


def test_other_branches_are_refused_where_a_run_goes_on(log: Path, tmp_path: Path) -> None:
    cut = run(tmp_path / "cut", config(log, *forked(), train__max_steps=4))
    others = [BRANCHES[0], {**BRANCHES[1], "name": "all"}]
    with pytest.raises(ConfigError, match=r"phases\.1\.fork: step-00000004 stands in .* target, both"):
        run(cut, config(log, *forked(others)))


def test_lengths_stay_inside_a_round(log: Path, tmp_path: Path) -> None:
    """Other lengths would leave branches that were trained for unlike many steps."""
    fork = {"branches": BRANCHES, "every": 4}
    cut = run(tmp_path / "run", config(log, {"steps": 12, "fork": fork}, train__max_steps=3))
    for phase, key in (
        ({"steps": 3, "fork": fork}, "steps = 3"),
        ({"passes": 2, "fork": fork}, "steps = None"),
        ({"steps": 12, "fork": {**fork, "every": 2}}, "fork.every = 2"),
    ):
        with pytest.raises(ConfigError, match=rf"phases.0.{key}: step-\d+ stands inside a round"):
            run(cut, config(log, phase))
