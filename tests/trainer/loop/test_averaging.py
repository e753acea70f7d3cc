"""Averages of a phase: what a run keeps, going on inside one, and what evaluate and export make of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pipelines.export_version
from embeddings.errors import CheckpointError, ConfigError, SnapshotError
from pipelines.evaluate import evaluate
from pipelines.export import export
from tests.helpers.logs import small_log
from tests.trainer.loop.test_phases import at, config, run
from trainer.checkpoint.files import checkpoints, read_state
from trainer.config.phases import AverageConfig
from trainer.loop.phases import phases_of
from trainer.loop.remarks import _of_phases
from trainer.quality import overlap
from trainer.snapshot import load_snapshot
from trainer.update.averaging import beta_density

# The average begins where the first phase ends.
BETA = {"kind": "beta", "beta": 0.5}
WARM, LAST = {"steps": 2, "name": "warm"}, {"steps": 4, "name": "last", "average": BETA}
SEARCHED = {"model__projection": "feature", "groups__attention__init_scale": 0.7}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("averages") / "log", seed=1)


@pytest.fixture(scope="module")
def made(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("made") / "run", config(log, WARM, LAST, **SEARCHED))


def averages(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("average."): each for name, each in tensors.items() if name[:8] == "average."}


def cut_back(made: Path, to: Path, step: int) -> Path:
    """A copy of a run as it was after a step."""
    shutil.copytree(made, to)
    for path in checkpoints(to / "checkpoints"):
        if int(path.name[-8:]) > step:
            shutil.rmtree(path)
    return to


def test_a_checkpoint_holds_the_average_over_its_phase_beside_the_weights(made: Path) -> None:
    path = [at(made, step) for step in range(2, 7)]
    found, shares = (
        averages(path[-1]),
        torch.tensor([beta_density(0.5, k, 4) for k in range(5)], dtype=torch.float64),
    )
    dense = [name for name in path[-1] if name.startswith("model.") and "collections." not in name]
    assert found and {f"model.{name}" for name in found} == set(dense)
    moved = 0
    for name, average in found.items():
        weights = torch.stack([each[f"model.{name}"].double() for each in path])
        expected = (shares @ weights.flatten(1) / shares.sum()).view(average.shape)
        torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
        moved += int(not torch.equal(average.float(), path[-1][f"model.{name}"]))
    assert average.dtype == torch.float64 and moved > len(found) / 2
    assert not averages(at(made, 2))


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_run_goes_on_with_its_average_to_the_bit(log: Path, made: Path, tmp_path: Path, step: int) -> None:
    """Also from a checkpoint without one, which stands at the end of the phase before."""
    again = run(cut_back(made, tmp_path / "run", step), config(log, WARM, LAST, **SEARCHED))
    before, after = at(made, 6), at(again, 6)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("average", "said"),
    [
        ({"kind": "beta", "beta": 0.25}, "began with beta = 0.5, now it is 0.25"),
        ({"kind": "ema"}, "began with kind = 'beta', now it is 'ema'"),
        ({"kind": "beta", "steps": 5}, "began with steps = 4, now it is 5"),
    ],
)
def test_an_average_stays_what_it_began_as(
    log: Path, made: Path, tmp_path: Path, average: dict[str, Any], said: str
) -> None:
    steps = average.pop("steps", 4)
    changed = {"steps": steps, "name": "last", "average": average}
    with pytest.raises(ConfigError, match=said):
        run(cut_back(made, tmp_path / "run", 4), config(log, WARM, changed, **SEARCHED))


def test_an_average_cannot_begin_inside_its_phase_but_may_end_there(
    log: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = config(log, WARM, {"steps": 4, "name": "last"}, **SEARCHED)
    ended = run(cut_back(made, tmp_path / "ended", 4), without)
    assert "phase last: its average is no longer kept" in capsys.readouterr().out
    assert not averages(at(ended, 6)) and "average" not in read_state(checkpoints(ended / "checkpoints")[0])
    cut = cut_back(ended, tmp_path / "cut", 5)
    with pytest.raises(ConfigError, match=r"phases\.1\.average: step-0+5 stands inside this phase"):
        run(cut, config(log, WARM, LAST, **SEARCHED))


def test_adopted_weights_are_the_average_and_the_next_phase_begins_with_them(
    log: Path, made: Path, tmp_path: Path
) -> None:
    adopting = {**LAST, "average": {**BETA, "adopt": True}}
    found = run(tmp_path / "run", config(log, WARM, adopting, {"steps": 1}, **SEARCHED))
    own, others = at(found, 6), at(made, 6)
    assert not averages(at(found, 7))
    for name, average in averages(others).items():
        assert torch.equal(own[f"model.{name}"], average.float())
    (table,) = [name for name in own if name.startswith("model.") and "attention__item_id" in name]
    assert torch.equal(own[table], others[table])


def test_a_moving_average_needs_no_number_of_steps_and_comes_to_its_end_with_the_run(
    log: Path, tmp_path: Path
) -> None:
    found = run(tmp_path / "run", config(log, {"passes": 1, "average": {"kind": "ema", "decay": 0.5}}))
    steps = max(int(path.name[-8:]) for path in checkpoints(found / "checkpoints"))
    name = next(name for name in averages(at(found, steps)) if name.endswith("weight"))
    weights = [at(found, step)[f"model.{name}"].double() for step in range(1, steps + 1)]
    shares = [0.5 ** (steps - step) for step in range(1, steps + 1)]
    # What was there before the first step is all that is left.
    rest = averages(at(found, steps))[name] * sum([*shares, 0.5**steps])
    rest -= sum(share * weight for share, weight in zip(shares, weights, strict=True))
    first = averages(at(found, 1))[name] * 1.5 - weights[0]
    torch.testing.assert_close(rest / 0.5**steps, first * 2, rtol=1e-6, atol=1e-6)


def test_an_early_end_and_a_known_end_do_not_go_together(log: Path) -> None:
    stops = {"steps": 4, "early_stopping": {"patience": 1}}
    for average in (BETA, {"kind": "ema", "adopt": True}):
        with pytest.raises(ConfigError, match="needs the end of the phase to be known"):
            phases_of(config(log, {**stops, "average": average}, train__validate_every=1))
    phases_of(config(log, {**stops, "average": {"kind": "ema"}}, train__validate_every=1))
    with pytest.raises(ValueError, match=r"average\.adopt: there is no average"):
        AverageConfig(adopt=True)


def test_an_average_that_nobody_takes_is_said(log: Path) -> None:
    left = list(_of_phases(config(log, {"steps": 1, "average": BETA}, LAST)))
    assert left == [
        "phases.0.average (it ends with the phase, which is not the last one, and is not adopted)"
    ]
    adopted = {"steps": 1, "average": {**BETA, "adopt": True}}
    assert not list(_of_phases(config(log, adopted, LAST)))


def scores(folder: Path, name: str) -> Any:
    return pq.read_table(folder / name).to_pydict()


def test_evaluate_takes_raw_or_averaged_weights_and_says_how_alike_their_searches_are(
    log: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(made, "test")
    raw = scores(made, "scores-test.parquet")
    capsys.readouterr()
    evaluate(made, "test", weights="averaged")
    said = capsys.readouterr().out
    assert "averaged weights: the search of main keeps " in said and "test, after step 6, averaged" in said
    assert scores(made, "scores-test.parquet") == raw
    averaged = scores(made, "scores-test-averaged.parquet")
    summary = json.loads((made / "summary.json").read_text())
    assert averaged != raw and summary["test_averaged"] != summary["test"]
    assert 0 < summary["test_averaged_overlap"]["main"] <= 1
    # A run that took them for its weights has their scores.
    adopting = {**LAST, "average": {**BETA, "adopt": True}}
    adopted = run(tmp_path / "run", config(log, WARM, adopting, **SEARCHED))
    evaluate(adopted, "test")
    assert scores(adopted, "scores-test.parquet") == averaged
    evaluate(made, "test", "4", weights="averaged")
    assert "its average misses 2 steps" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="holds no averaged weights"):
        evaluate(made, "test", "2", weights="averaged")


def test_export_writes_averaged_weights_that_search_alike_and_no_others(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = export(made, tmp_path / "snapshot", attention_dtype="fp32", weights="averaged")
    assert "averaged weights: the search of main keeps " in capsys.readouterr().out
    dense, average = load_file(version / "dense.safetensors"), averages(at(made, 6))
    assert dense.keys() == average.keys()
    assert all(torch.equal(dense[name], average[name].float()) for name in average)
    assert load_snapshot(version).manifest.weights == "averaged"
    assert load_snapshot(export(made, tmp_path / "raw")).manifest.weights == "raw"
    with mock.patch.object(overlap, "LEAST_OVERLAP", 1.01), pytest.raises(SnapshotError) as refused:
        export(made, tmp_path / "other", weights="averaged")
    assert "in main: the averaged attention weights do not fit the tables" in str(refused.value)
    assert not list((tmp_path / "other").glob("v*"))
    with pytest.raises(CheckpointError, match="misses 2 steps; train it to its end, or export raw"):
        export(made, tmp_path / "other", which="4", weights="averaged")


def test_weights_that_the_search_does_not_see_change_nothing_that_it_keeps(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = {**LAST, "freeze": ["branches.main.scorer"]}
    found = run(tmp_path / "run", config(log, WARM, frozen, **SEARCHED))
    export(found, tmp_path / "snapshot", weights="averaged")
    assert "keeps 100.00% of the top K of the raw ones" in capsys.readouterr().out
    assert pipelines.export_version.LEAST_OVERLAP == 0.95
