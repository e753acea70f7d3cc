"""D-Train: one head, clones of it, then each domain's by itself over a backbone that stays."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from torch import Tensor

import pipelines.train
from embeddings.errors import ConfigError
from tests.helpers.launching import ROOT, SETTINGS, launched, losses, tandemrec
from tests.helpers.logs import Row, Shape, random_rows, write_log
from tests.programs.drive import Fault, Plan
from tests.trainer.loop.test_phases import at, lines, same
from trainer.log.schema import FeatureInfo
from trainer.loop.loop import Trainer
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config

MAPS = ["head.towers.*.layers"]
PRE: dict[str, Any] = {"name": "pre", "steps": 4, "heads": "tied"}
POST: dict[str, Any] = {"name": "post", "steps": 3}
FINE: dict[str, Any] = {"name": "fine", "passes": 2, "each": "domain", "train": MAPS, "reset_state": MAPS}
DOMAINS = 3


def rows_of(seed: int, users: int) -> list[Row]:
    """Requests with candidates of several domains."""
    rng, rows = np.random.default_rng(seed), random_rows(seed, Shape(users=users))
    for row in rows:
        counts = row["request_num_candidates"]
        row["candidate_domain_id"] = [rng.integers(0, DOMAINS, count).tolist() for count in counts]
    return rows


def flipped(rows: list[Row], domain: int) -> list[Row]:
    """The same rows with other labels of one domain."""
    return [
        row
        | {
            "label_click": [
                [1 - y if d == domain else y for y, d in zip(*request, strict=True)]
                for request in zip(row["label_click"], row["candidate_domain_id"], strict=True)
            ]
        }
        for row in rows
    ]


def write(path: Path, fine: list[Row]) -> Path:
    """A log whose split `test` is what domains fine-tune on."""
    splits = {"train": rows_of(1, 20), "validation": rows_of(2, 12), "test": fine}
    return write_log(path, splits, more={"domain_id": FeatureInfo(rows=DOMAINS, side="candidate")})


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("d_train") / "log", rows_of(3, 8))


def config(log: Path, *phases: Mapping[str, Any], **changes: Any) -> Config:
    given = {**SETTINGS, "data.log": str(log), "checkpoint.every_steps": 1, "checkpoint.keep": 100}
    given |= {"train.validate_every": 2, "model.experts.hidden": [8], "phases": []}
    given |= {name.replace("__", "."): value for name, value in changes.items()}
    base = load_config(
        ROOT / "configs/d_train.toml", [f"{key}={json.dumps(value)}" for key, value in given.items()]
    )
    return Config.model_validate({**base.model_dump(), "phases": list(phases)})


def run(folder: Path, settings: Config) -> Path:
    with process_group() as ranks:
        pipelines.train.run(settings, folder, ranks)
    return folder


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("whole") / "run", config(log, PRE, POST, FINE))


def maps(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {name: each for name, each in tensors.items() if ".towers." in name and ".layers." in name}
    assert found and all(
        each.shape[0] == DOMAINS for name, each in found.items() if name.startswith("model.")
    )
    return found


def last(run_: Path) -> int:
    return max(line["step"] for line in lines(run_))


def test_one_head_then_clones_then_each_domain_by_itself(whole: Path) -> None:
    """Copies are equal to the bit as long as they are tied; a domain's own phase moves its row alone."""
    for step in (1, PRE["steps"]):
        assert all(
            torch.equal(each, each[:1].expand_as(each))
            for each in maps(at(whole, step)).values()
            if each.dim()
        )
    parted = maps(at(whole, PRE["steps"] + 1))
    assert any(
        not torch.equal(each[0], each[1]) for name, each in parted.items() if name.startswith("model.")
    )
    ends = {line["phase"]: line["step"] for line in lines(whole)}
    assert list(ends) == ["pre", "post", *(f"fine_domain{domain}" for domain in range(DOMAINS))]
    before = maps(at(whole, ends["post"]))
    for domain in range(DOMAINS):
        after = maps(at(whole, ends[f"fine_domain{domain}"]))
        for name, each in after.items():
            if name.startswith("model."):
                moved = [not torch.equal(each[other], before[name][other]) for other in range(DOMAINS)]
                assert moved == [other == domain for other in range(DOMAINS)], name
        before = after


def test_what_is_behind_the_heads_keeps_its_bits(whole: Path) -> None:
    """Tables, their state, all other dense weights, their moments and counts."""
    ends = {line["phase"]: line["step"] for line in lines(whole)}
    before, after = at(whole, ends["post"]), at(whole, last(whole))
    others = [name for name in before if not (".towers." in name and ".layers." in name)]
    assert sum("momentum1" in name for name in others) >= 4 and any("exp_avg" in name for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_boundaries_change_no_logit(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: clones are the one head, and a frozen backbone is the same function."""
    found: list[tuple[str, Tensor, Tensor]] = []
    go_on = Trainer._next_phase

    def logits(trainer: Trainer) -> Tensor:
        steps = trainer.course.supply.reader(trainer.course.phases[0], 0).steps()  # type: ignore[union-attr]
        with torch.no_grad():
            return torch.cat(
                [trainer.model(step.batch).logits for step, _ in zip(steps, range(4), strict=False)]
            )

    def watched(trainer: Trainer) -> None:
        before = logits(trainer)
        go_on(trainer)
        found.append((trainer.course.phase.name, before, logits(trainer)))

    monkeypatch.setattr(Trainer, "_next_phase", watched)
    run(tmp_path / "run", config(log, PRE, POST, FINE, checkpoint__every_steps=0))
    assert [name for name, _, _ in found] == ["post", *(f"fine_domain{domain}" for domain in range(DOMAINS))]
    assert all(torch.equal(before, after) for _, before, after in found)
    # Training did move them in between.
    assert not torch.equal(found[0][2], found[1][1])


STOPPED = {**FINE, "passes": 4, "split": "test", "early_stopping": {"patience": 1, "metric": "logloss"}}


def heads(run_: Path) -> dict[str, Tensor]:
    found = maps(at(run_, last(run_)))
    return {name: each for name, each in found.items() if name.startswith("model.")}


def test_a_domains_head_does_not_depend_on_what_others_fine_tune_on(tmp_path: Path) -> None:
    """Whether another domain has other labels, or no phase at all: not by a bit, wherever it stops."""
    fine, sparse = rows_of(3, 8), {"checkpoint__every_steps": 0}
    logs = [write(tmp_path / "a", fine), write(tmp_path / "b", flipped(fine, 1))]
    a, b = (
        run(tmp_path / f"run{place}", config(log, PRE, POST, STOPPED, **sparse))
        for place, log in enumerate(logs)
    )
    without = config(logs[0], PRE, POST, {**STOPPED, "domains": [0, 2]}, **sparse)
    c = run(tmp_path / "run2", without)
    counts = [[line["phase"] for line in lines(each)].count("fine_domain1") for each in (a, b, c)]
    assert counts[0] != counts[1] and counts[2] == 0
    for name, head in heads(a).items():
        for other in (b, c):
            assert torch.equal(head[[0, 2]], heads(other)[name][[0, 2]]), name
    assert any(not torch.equal(head[1], heads(b)[name][1]) for name, head in heads(a).items())


def test_every_domain_ends_with_its_best_head(log: Path, tmp_path: Path) -> None:
    """By its own logloss, what it began with included; tables are not saved for it."""
    fine = {**STOPPED, "early_stopping": {"patience": 2, "metric": "logloss"}}
    out = run(tmp_path / "run", config(log, PRE, POST, fine, checkpoint__keep=1, checkpoint__every_steps=0))
    ends, went_back = evaluated(out), 0
    for domain in range(DOMAINS):
        seen = [
            line["by_domain"][str(domain)]["logloss"]
            for line in lines(out, "validation")
            if line["phase"] == f"fine_domain{domain}"
        ]
        assert len(seen) >= 2 and ends[domain] <= min(seen) + 1e-6
        went_back += ends[domain] < seen[-1] - 1e-6
    assert went_back
    assert len(list((out / "checkpoints").glob("step-*"))) == 1


def evaluated(out: Path) -> list[float]:
    entry = json.loads((out / "summary.json").read_text())["validation"]
    return [entry["by_domain"][str(domain)]["logloss"] for domain in range(DOMAINS)]


def as_file(settings: Config, path: Path) -> Path:
    path.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
    return path


def test_a_killed_run_goes_on_to_the_same_bits(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL in the phase of a domain, behind that of another, which has gone back to its best head."""
    settings = config(log, PRE, POST, STOPPED, checkpoint__every_steps=3)
    whole, cut = run(tmp_path / "whole", settings), tmp_path / "cut"
    file = str(as_file(settings, tmp_path / "d_train.toml"))
    words = ("train", "--config", file, "--out", str(cut))
    # It kills itself: on a busy machine another process would come too late.
    third = [line["step"] for line in lines(whole) if line["phase"] == "fine_domain1"][2]
    plan = Plan(str(cut), file, [], [Fault(0, third)]).write(tmp_path / "plan.json")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    killed = launched("tests.programs.drive", str(plan))
    monkeypatch.undo()
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert last(cut) in (third - 1, third) and third < last(whole)
    done = tandemrec(*words)
    assert done.returncode == 0, done.stderr
    assert same(at(whole, last(whole)), at(cut, last(cut)))
    for split in ("train", "validation"):
        told = [
            [
                {key: line[key] for key in ("step", "phase", "loss", "logloss") if key in line}
                for line in found
            ]
            for found in (lines(whole, split), lines(cut, split))
        ]
        assert told[0] == told[1]


def test_two_ranks_train_as_one(log: Path, tmp_path: Path) -> None:
    settings = config(log, PRE, POST, STOPPED, checkpoint__every_steps=0, data__batch_candidates=48)
    one = losses(run(tmp_path / "one", settings))
    file, out = as_file(settings, tmp_path / "d_train.toml"), tmp_path / "two"
    done = tandemrec("train", "--config", str(file), "--out", str(out), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    two = losses(out)
    assert len(one) == len(two) and one == pytest.approx(two, rel=1e-4)


def test_what_does_not_fit_is_refused_or_said(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*phases: Mapping[str, Any], **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            run(tmp_path / "refused", config(log, *phases, **changes))
        return str(caught.value)

    kept = {key: value for key, value in FINE.items() if key != "reset_state"}
    assert "name it in reset_state, too" in refused(PRE, kept)
    decay = {"train__optimizer": "adamw", "train__weight_decay": 0.1}
    assert "would draw the heads of all other domains" in refused(PRE, FINE, **decay)
    assert "the model has none" in refused(PRE, model__towers__per="task")
    assert "no candidate of the split train has domain_id = 7" in refused(PRE, {"steps": 1, "domains": [7]})
    shared = {"steps": 1, "each": "domain", "domains": [1], "reset_state": MAPS}
    run(
        tmp_path / "said",
        config(log, {**PRE, "steps": 1}, POST, shared, {**PRE, "name": "again", "steps": 1}),
    )
    said = capsys.readouterr().out
    assert "phase phase3_domain1: also trains what domains share, so that their order matters" in said
    assert said.count("the heads of all domains are now that of domain 0") == 2


def test_a_domain_that_validation_lacks_is_trained_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(2, 8)
    few = [row | {"candidate_domain_id": [[0] * len(d) for d in row["candidate_domain_id"]]} for row in rows]
    splits = {"train": rows_of(1, 12), "validation": few}
    log = write_log(tmp_path / "log", splits, more={"domain_id": FeatureInfo(rows=DOMAINS, side="candidate")})
    fine = {**STOPPED, "split": "train", "passes": 1, "domains": [0, 1]}
    out = run(tmp_path / "run", config(log, {**PRE, "steps": 1}, fine, checkpoint__every_steps=0))
    assert "fine_domain1: the validation split has no candidate of domain 1" in capsys.readouterr().out
    assert {line["phase"] for line in lines(out)} == {"pre", "fine_domain0", "fine_domain1"}
    assert {line["phase"] for line in lines(out, "validation")} == {"pre", "fine_domain0"}
