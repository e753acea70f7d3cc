"""Who takes which trial, what is proposed, and what a folder's study may not be mixed with."""

from __future__ import annotations

import re
from math import nan
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import ConfigError
from pipelines.tune.plan import StudyPlan, read_plan
from pipelines.tune.report import TrialRow
from pipelines.tune.study import Claim, Outcome, SharedStudy, Validation
from tests.helpers.logs import small_log
from tests.helpers.studies import BUDGET, CONFIG, RATES, STUDY, given, plan_of, shared, space_in

GRID = """
[parameters]
train.epochs = { low = 1, high = 2 }
groups.attention.features = { choices = [[], ["item_id"]] }
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("study") / "log", seed=1)


@pytest.fixture(scope="module")
def plan(log: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyPlan:
    return plan_of(tmp_path_factory.mktemp("plan"), log, trials=6)


def value_of(claim: Claim) -> float:
    return -abs(claim.drawn["train.learning_rate"] - 0.01)


def all_claims(study: SharedStudy, upto: int = 99) -> list[Claim]:
    claims = []
    while len(claims) < upto and (claim := study.claim()) is not None:
        claims.append(claim)
        study.finish(Outcome("complete", value_of(claim), 4))
    return claims


def test_a_study_has_so_many_trials_and_begins_with_the_configuration(
    plan: StudyPlan, tmp_path: Path
) -> None:
    claims = all_claims(shared(plan, tmp_path))
    assert [claim.number for claim in claims] == list(range(6))
    assert claims[0].drawn == {"train.learning_rate": 0.003, "groups.*.learning_rate": 0.2}
    assert len({claim.drawn["train.learning_rate"] for claim in claims}) == 6


def test_an_interrupted_study_proposes_the_same(plan: StudyPlan, tmp_path: Path) -> None:
    whole = all_claims(shared(plan, tmp_path / "whole"))
    first = shared(plan, tmp_path / "cut")
    before = all_claims(first, upto=3)
    lost = first.claim()
    first.close()
    after = all_claims(shared(plan, tmp_path / "cut"))
    assert lost is not None
    assert after[0] == Claim(lost.number, lost.drawn, starts=2)
    assert [claim.drawn for claim in before + after] == [claim.drawn for claim in whole]


def test_a_trial_is_taken_once_while_its_worker_lives(plan: StudyPlan, tmp_path: Path) -> None:
    workers = [shared(plan, tmp_path) for _ in range(3)]
    claims = [worker.claim() for worker in workers]
    assert [claim and claim.number for claim in claims] == [0, 1, 2]
    workers[1].close()
    again = shared(plan, tmp_path).claim()
    assert again is not None
    assert (again.number, again.starts) == (1, 2)


def test_a_stopped_trial_goes_on_with_its_seconds(plan: StudyPlan, tmp_path: Path) -> None:
    study = shared(plan, tmp_path)
    study.claim()
    study.finish(Outcome("stopped", steps=2, cpu_s=3.0))
    assert study.claim() == Claim(0, plan.defaults, starts=2)
    study.finish(Outcome("complete", 0.5, 4, 2.0))
    assert study.trials[0].user_attrs["cpu_s"] == 5.0


def test_a_torn_line_of_the_journal_is_cut_off(plan: StudyPlan, tmp_path: Path) -> None:
    all_claims(shared(plan, tmp_path), upto=2)
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"op_code": 5, "worker')
    assert [claim.number for claim in all_claims(shared(plan, tmp_path))] == [2, 3, 4, 5]
    assert len(shared(plan, tmp_path).trials) == 6


def test_pruned_trials_stay_pruned_when_taken_up(log: Path, tmp_path: Path) -> None:
    median = STUDY.replace('"none"', '"median"').replace("random_trials = 2", "random_trials = 1\nwarmup = 0")
    plan = plan_of(tmp_path / "plan", log, median, BUDGET, RATES)
    study = shared(plan, tmp_path)
    study.claim()
    assert not study.report(Validation(2, 0.6))
    study.finish(Outcome("complete", 0.7, 4))
    study.claim()
    assert study.report(Validation(2, 0.5, cpu_s=3.0))
    study.close()
    again = shared(plan, tmp_path)
    claim = again.claim()
    assert claim is not None and (claim.number, claim.pruned) == (1, True)
    # What it had trained before its worker died counts, too.
    assert again.finish(Outcome("pruned", cpu_s=0.5)) == Outcome("pruned", nan, 2, 3.5)
    assert [trial.state.name for trial in again.trials] == ["COMPLETE", "PRUNED"]
    assert [TrialRow.of(trial, plan).steps for trial in again.trials] == [4, 2]
    again.claim()
    assert not again.report(Validation(2, 0.4, last=True))


def test_validations_that_are_repeated_count_once(plan: StudyPlan, tmp_path: Path) -> None:
    study = shared(plan, tmp_path)
    study.claim()
    for step, value in ((2, 0.6), (4, 0.7), (2, 0.1), (4, 0.1)):
        assert not study.report(Validation(step, value))
    assert not study.report(Validation(6, nan))
    assert study.trials[0].intermediate_values == {2: 0.6, 4: 0.7}


def test_a_key_that_changes_others_is_not_the_configuration_as_it_is(log: Path, tmp_path: Path) -> None:
    """Its first scale, set alone, makes the numbers of a group that is scored uniform, which were normal."""
    text = '[parameters]\n"groups.attention.init_scale" = { low = 0.1, high = 1.0 }\n'
    plan = plan_of(tmp_path / "plan", log, STUDY, BUDGET, text)
    (why,) = plan.outside
    line = 'groups.attention.init = "normal"'
    assert "groups.attention.init = uniform, and not normal; to keep that, write " + line in why
    said = plan_of(tmp_path / "said", log, STUDY, f"{BUDGET}[trial]\n{line}\n", text)
    assert said.outside == [] and said.defaults == {"groups.attention.init_scale": 0.25}


def test_all_is_said_of_tied_keys_that_differ_and_change_others(log: Path, tmp_path: Path) -> None:
    keys = 'keys = ["groups.attention.init_scale", "groups.representation.init_scale"]'
    plan = plan_of(
        tmp_path, log, STUDY, BUDGET, f"[parameters]\nscale = {{ {keys}, low = 0.1, high = 1.0 }}\n"
    )
    differ, along = plan.outside
    assert differ.startswith("scale: its keys differ: groups.attention.init_scale = 0.25, ")
    assert along.startswith("scale: a trial that sets its keys has groups.attention.init = uniform, and not ")


def test_a_grid_is_walked_through_once(log: Path, tmp_path: Path) -> None:
    text = STUDY.replace("trials = 4", 'trials = 9\nsampler = "grid"')
    plan = plan_of(tmp_path / "plan", log, text, BUDGET, GRID)
    claims = all_claims_of_grid(shared(plan, tmp_path))
    assert claims[0] == {"train.epochs": 1, "groups.attention.features": "[]"}
    points = {tuple(claim.values()) for claim in claims}
    assert len(claims) == 4
    assert points == {(n, features) for n in (1, 2) for features in ("[]", '["item_id"]')}


def all_claims_of_grid(study: SharedStudy) -> list[dict[str, Any]]:
    found = []
    while (claim := study.claim()) is not None:
        found.append(claim.drawn)
        study.finish(Outcome("failed", reason="as planned"))
    return found


def test_other_studies_are_refused(plan: StudyPlan, log: Path, tmp_path: Path) -> None:
    all_claims(shared(plan, tmp_path))
    other = plan_of(tmp_path / "other", log, trials=6, train__seed=3)
    with pytest.raises(ConfigError, match=re.escape("train.seed was 17, is 3")):
        shared(other, tmp_path)
    narrow = plan_of(tmp_path / "narrow", log, STUDY, BUDGET, RATES.replace("3e-4", "1e-3"))
    was = "parameters.train.learning_rate was { low = 0.0003, high = 0.03, log = true }, is { low = 0.001, "
    with pytest.raises(ConfigError, match=f"{re.escape(was)}.*another --out"):
        shared(narrow, tmp_path)
    linear = plan_of(tmp_path / "linear", log, STUDY, BUDGET, RATES.replace("3e-2, log = true", "3e-2"))
    with pytest.raises(ConfigError, match=r"log = true }, is { low = 0.0003, high = 0.03 }"):
        shared(linear, tmp_path)
    second = small_log(tmp_path / "second", seed=2)
    with pytest.raises(ConfigError) as error:
        shared(plan_of(tmp_path / "data", second, trials=6), tmp_path)
    assert re.search(rf"the log was {log} \([0-9a-f]{{8}}\), is {second} \([0-9a-f]{{8}}\)", str(error.value))
    more = plan_of(tmp_path / "more", log, trials=7)
    study = shared(more, tmp_path)
    assert [claim.number for claim in all_claims(study)] == [6]
    # As the first version of studies has kept its ranges.
    ranges = {f"parameters.{each.name}": f"{each.range} {each.keys}" for each in more.parameters}
    study.study.set_user_attr("facts", {**more.facts, **ranges})
    assert len(shared(more, tmp_path).trials) == 7


def test_a_database_keeps_trials_too(plan: StudyPlan, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    claims = all_claims(SharedStudy(plan, tmp_path, url), upto=2)
    assert [claim.number for claim in claims] == [0, 1]
    assert len(SharedStudy(plan, tmp_path, url).trials) == 2
    with pytest.raises(ConfigError, match="--storage nothing://x"):
        SharedStudy(plan, tmp_path, "nothing://x")


REFUSED: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "unknown": (
        (STUDY, BUDGET, RATES.replace("train.l", "train.lo")),
        {},
        "did you mean 'train.learning_rate'",
    ),
    "star": (
        (STUDY, BUDGET, RATES.replace("*.l", "*.lo")),
        {},
        "did you mean 'groups.attention.learning_rate'",
    ),
    "bounds": (
        (STUDY, BUDGET, RATES.replace("0.01", "-1").replace(", log = true", "")),
        {},
        "greater than 0",
    ),
    "budget": ((STUDY, BUDGET.replace("max", "mxa"), RATES), {}, "did you mean 'train.max_steps'"),
    "twice": (
        (STUDY, BUDGET, RATES, "x = { keys = ['train.learning_rate'], low = 0.1, high = 1 }"),
        {},
        "set by two",
    ),
    "keys": ((STUDY, BUDGET, RATES, "x = { keys = ['model.k', 'model.k'], low = 1, high = 2 }"), {}, "twice"),
    "trial": (
        (STUDY, BUDGET + "learning_rate = 0.1\n", RATES),
        {},
        "[trial] sets train.learning_rate=0.1: [parameters] searches that, by train.learning_rate",
    ),
    "set": ((STUDY, BUDGET, RATES), {"train__learning_rate": 0.1}, "searches that, by train.learning_rate"),
    "pruner": ((STUDY.replace('"none"', '"median"'), RATES), {}, "set validate_every in [trial.train]"),
    "task": ((STUDY + "task = 'buy'", BUDGET, RATES), {}, "study.task = 'buy': no such task"),
    "grid": ((STUDY + "sampler = 'grid'", BUDGET, RATES), {}, "a grid needs choices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_first_trial(case: str, log: Path, tmp_path: Path) -> None:
    parts, changes, message = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(message)):
        plan_of(tmp_path, log, *parts, **changes)


def test_a_whole_section_is_held_against_parameters(log: Path, tmp_path: Path) -> None:
    overrides = [*given(log), "train={ learning_rate = 0.1 }"]
    with pytest.raises(ConfigError, match=r"searches that, by train\.learning_rate; leave"):
        read_plan(CONFIG, space_in(tmp_path), overrides)
