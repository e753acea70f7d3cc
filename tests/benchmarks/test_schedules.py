"""`bench schedules` and `bench rules`: their phases are what the tables say, and first passes are shared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rules import RULES, phase_of, toml_of
from benchmarks.schedules import SCHEDULES, main, text_of
from tests.helpers.launching import SETTINGS
from tests.helpers.logs import small_log
from trainer.loop.phases import phases_of
from trainer.run_config import load_config

DARE, MMOE = Path("configs/dare.toml"), Path("configs/mmoe.toml")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_the_one_before_it_and_one_pass_more(name: str, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(text_of(name, DARE))
    phases = phases_of(load_config(tmp_path / "c.toml", ["data.log=x"]))
    assert [phase.name for phase in phases] == [f"pass{number + 1}" for number in range(len(phases))]
    assert all(phase.settings.passes == 1 for phase in phases)
    last, given = phases[-1].settings, SCHEDULES[name]
    assert last.model_dump(mode="json", exclude_defaults=True, include=set(given.phase)) == given.phase
    if given.before:
        (tmp_path / "b.toml").write_text(text_of(given.before, DARE))
        assert phases_of(load_config(tmp_path / "b.toml", ["data.log=x"])) == phases[:-1]
    else:
        assert len(phases) == 1


def test_schedules_of_a_seed_share_their_passes_and_what_is_finished_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, out = small_log(tmp_path / "log", seed=1, users=12), tmp_path / "out"
    given = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    words = ["--config", str(DARE), "--log", str(log), "--out", str(out), "--seeds", "3"]
    words += [word for override in given for word in ("--set", override)]
    main([*words, "--schedule", "representation"])
    lines = {
        name: (out / f"{name}-3" / "metrics.jsonl").read_text().splitlines()
        for name in ("one", "representation")
    }
    first, both = lines["one"], lines["representation"]
    assert both[: len(first)] == first and len(both) > len(first)
    assert {json.loads(line)["phase"] for line in both[len(first) :]} == {"pass2"}
    said = capsys.readouterr().out
    assert said.count("test AUC 0.") + said.count("test AUC 1.") == 2
    (out / "one-3").rename(out / "gone")
    main([*words, "--schedule", "representation"])
    again = capsys.readouterr().out
    assert "seed 3: test AUC" not in again
    assert again.split("schedule ")[1].split("AMD")[0].split("commit")[0] in said


@pytest.mark.parametrize("name", RULES)
def test_a_rule_trains_as_many_steps_as_the_plain_one(name: str, tmp_path: Path) -> None:
    rule, file = RULES[name], tmp_path / "c.toml"
    file.write_text(
        f"extends = {json.dumps(str(MMOE.absolute()))}\nphases = [{toml_of(phase_of(rule, 40))}]\n"
    )
    given = ["data.log=x", "data.domain=domain_id", *rule.given]
    (phase,) = phases_of(load_config(file, given))
    branches = len(phase.settings.fork.branches) if phase.settings.fork else 1
    assert phase.train.max_steps * branches == 40 and branches == rule.branches
    assert name == "summed" or rule.phase or rule.given
