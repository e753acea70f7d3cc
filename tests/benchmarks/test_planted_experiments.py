"""The planted experiments: their models can be built, their measures are right, their claims are counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.planted.experiments import run
from benchmarks.planted.experiments.collapse import abundance
from benchmarks.planted.experiments.experiment import Experiment, Measured
from benchmarks.planted.experiments.probe import BASE, one_interaction, relation, trained
from benchmarks.planted.experiments.run import Change, log_of, records_of, run_all, section
from benchmarks.planted.experiments.table import EXPERIMENTS
from pipelines.synth.kinds import KINDS
from pipelines.synth.synth import synth
from trainer.assemble import build_trainable
from trainer.log.schema import read_manifest
from trainer.model.heads.grouped import GroupedLinear
from trainer.objectives.covariance import Covariance
from trainer.run_config import load_config


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A log of 24 users for each kind that an experiment is on."""
    root = tmp_path_factory.mktemp("small")
    kinds = {experiment.kind for experiment in EXPERIMENTS.values()}
    for kind in kinds:
        synth(root / kind, kind, 1, 24)
    return {kind: root / kind for kind in kinds}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_model_of_an_experiment_fits_its_log(name: str, small: dict[str, Path]) -> None:
    experiment = EXPERIMENTS[name]
    assert experiment.kind in KINDS and experiment.tied <= set(experiment.models)
    log = small[experiment.kind]
    for overrides in experiment.models.values():
        config = load_config(BASE, [*experiment.overrides, *overrides, f"data.log={log}"])
        model, groups = build_trainable(config, read_manifest(log), torch.device("meta"))
        assert groups["representation"].tables and list(model.branches) == ["main"]


def test_one_run_from_the_log_to_its_values(small: dict[str, Path], tmp_path: Path) -> None:
    """Two steps of STEM: scores of the whole test split beside their truth, experts, tables and gradients."""
    experiment = EXPERIMENTS["agree"]
    log = small["agree"]
    overrides = [*experiment.models["stem"], f"data.log={log}", "train.max_steps=2"]
    overrides += ["train.validate_every=0", "train.early_stopping.patience=0", "data.batch_candidates=64"]
    of = trained(tmp_path / "run", overrides, tied=False)
    count = read_manifest(log).splits["test"].candidates
    assert of.scored.score.shape == (count, 2) and of.truth["segment"].shape == (count,)
    assert len(of.negatives) == 2 and min(of.negatives) > 0
    assert set(of.learned) == {"click", "like"} and of.learned["click"] != of.logloss("click")
    assert len(of.tables) == 3 and all(table.shape == (300, 4) for table in of.tables.values())
    assert np.isfinite(of.covariance)
    values = experiment.measure(of)
    halves = np.mean([values["click, agreeing"], values["click, conflicting"]])
    assert values["click"] == pytest.approx(halves, abs=0.2) and set(values) >= {"like", "like, agreeing"}


def test_abundance_counts_the_dimensions_that_a_table_uses() -> None:
    assert abundance(np.eye(8)) == pytest.approx(8)
    assert abundance(np.ones((20, 8))) == pytest.approx(1)


def test_covariance_is_that_of_the_loss() -> None:
    outputs = [torch.randn(30, 3, 4, dtype=torch.float64) for _ in range(2)]
    loss = Covariance(1.0).value(torch.cat(outputs))
    # The loss adds up three pairs, of which this is the mean.
    covariance, correlation = relation(outputs)
    assert covariance == pytest.approx(float(loss) / 3)
    assert np.isnan(relation([outputs[0][:, :1]])).all()
    # Experts that give a tenth have a hundredth of the covariance, and the same correlation; an element that
    # never changes has none.
    small = [torch.cat([each / 10, torch.zeros_like(each[:, :, :1])], dim=2) for each in outputs]
    width = outputs[0].shape[2]
    whole = width**2 / (width + 1) ** 2
    assert relation(small) == pytest.approx((covariance / 100 * whole, correlation))


def test_one_interaction_is_the_first_experts_for_all() -> None:
    torch.manual_seed(0)
    layer, x = GroupedLinear(3, 5, 2), torch.randn(3, 7, 5)
    own: Tensor = layer(x)
    with one_interaction():
        tied = layer(x)
    assert torch.equal(tied[0], own[0]) and torch.equal(layer(x), own)
    for place in (1, 2):
        assert torch.allclose(tied[place], x[place] @ layer.weight[0].T + layer.bias[0], atol=1e-6)


def test_claims_are_counted_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(of: Measured) -> dict[str, float]:
        raise AssertionError

    experiment = Experiment(
        kind="sparse_25",
        paper="A paper",
        models={"one": [], "other": []},
        measure=measure,
        claims={"one is lower": lambda v: v["one"]["logloss"] < v["other"]["logloss"]},
        users=12,
    )
    monkeypatch.setitem(EXPERIMENTS, "mine", experiment)
    records = [
        {"model": model, "seed": seed, "values": {"logloss": value}}
        for seed, values in ((1, (0.3, 0.4)), (2, (0.5, 0.4)), (3, (0.2, 0.4)))
        for model, value in zip(experiment.models, values, strict=True)
    ]
    text = "\n".join(section("mine", records, tmp_path))
    assert "* one is lower: 2 of 3 seeds" in text
    assert "| one | 0.3333 ± 0.1528 |" in text
    oracle = read_manifest(log_of(experiment, 1, tmp_path)).report["oracle"]["test"]["logloss"]
    assert 0 < oracle < 0.7 and "Logloss of the oracle: " in text


def test_a_changed_run_is_not_taken_for_the_experiments_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What --set, --users and --model change is trained by itself, and both are found again."""
    given: list[list[str]] = []

    def train(out: Path, overrides: list[str], tied: bool) -> Measured:
        out.mkdir(parents=True)
        given.append(overrides)
        return Measured(None, {}, 0.0, 0.0, {}, (), learned={"click": 0.3})  # type: ignore[arg-type]

    def measure(of: Measured) -> dict[str, float]:
        return {"logloss": 0.1 * len(given)}

    models = {"one": ["groups.representation.dim=4"], "other": []}
    monkeypatch.setitem(
        EXPERIMENTS, "mine", Experiment("sparse_25", "A paper", models, measure, {}, users=12)
    )
    monkeypatch.setattr(run, "trained", train)
    wider = Change(("groups.representation.dim=8",), users=24, models=("one",))
    assert [each["model"] for each in run_all("mine", [1], tmp_path)] == ["one", "other"]
    changed = run_all("mine", [1], tmp_path, wider)
    assert [each["values"]["logloss"] for each in changed] == pytest.approx([0.3])
    # The last override of a key is the one that counts.
    assert [word for word in given[2] if "dim" in word] == [models["one"][0], *wider.settings]
    assert any(word == f"data.log={tmp_path / 'sparse_25-1-24'}" for word in given[2])
    assert read_manifest(tmp_path / "sparse_25-1-24").ingest["synth"]["users"] == 24
    assert [each["model"] for each in run_all("mine", [1], tmp_path)] == ["one", "other"]
    assert run_all("mine", [1], tmp_path, wider) == changed and len(given) == 3
    assert changed[0]["learned"] == {"click": 0.3}
    assert len(records_of(tmp_path / "mine" / "results.jsonl")) == 3
