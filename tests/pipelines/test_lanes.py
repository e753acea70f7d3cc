"""A run with lanes of tables, from its checkpoints to plain tables, a snapshot and another run's start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from embeddings.lookup.sharding import table_of
from tests.helpers.launching import SETTINGS, overrides, tandemrec
from tests.trainer.test_presets import log_of_tasks
from trainer.checkpoint.tensors import TensorReader
from trainer.checkpoint.unsharded import PlainTables, open_plain_tables

RULE = {"train.update": "per_task", "train.decay": "none"}
# The second save holds touched rows only.
RUN = {**SETTINGS, **RULE, "train.max_steps": 6, "checkpoint.every_steps": 3, "checkpoint.full_every": 2}


def trained(log: Path, run: Path, settings: dict[str, Any], preset: str = "mmoe", ranks: int = 1) -> str:
    words = overrides({"data.log": str(log), **settings})
    done = tandemrec("train", "--config", f"configs/{preset}.toml", "--out", str(run), *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Of training, without what differs from one run to the next."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**line, "samples_per_s": 0} for line in lines if line["split"] == "train"]


def saved(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint as they lie there."""
    reader = TensorReader(run / f"checkpoints/step-{step:08}")
    sizes = {name: entry.size for name, entry in reader._tensors.items()}
    return {
        name: reader._read_alone(name, ChunkStorageMetadata(torch.Size([0] * len(size)), size))
        for name, size in sizes.items()
    }


def plain(run: Path) -> PlainTables:
    out = run.parent / f"{run.name}-plain"
    done = tandemrec("unshard", "--run", str(run), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    return open_plain_tables(out)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("lanes") / "log")


@pytest.fixture(scope="module")
def run(log: Path) -> Path:
    out = log.parent / "run"
    assert "attention__item_id/conversion" in trained(log, out, RUN)
    return out


@pytest.fixture(scope="module")
def tables(run: Path) -> PlainTables:
    return plain(run)


def test_a_run_that_was_stopped_goes_on_to_the_bit(log: Path, run: Path) -> None:
    """States of tasks and lanes are all there, and what is reported of dominance is the same."""
    again = log.parent / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step-00000006")
    assert "resumed from" in trained(log, again, RUN)
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3, 4, 5, 6]
    assert lines_of(again) == lines_of(run) and "groups.attention" in lines_of(run)[5]["dominance"]["mean"]
    before, after = saved(run, 6), saved(again, 6)
    assert before.keys() == after.keys() and sum(name.endswith("conversion.exp_avg") for name in before) > 10
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    done = tandemrec(
        "train", "--config", "configs/mmoe.toml", "--out", str(again),
        *overrides({"data.log": str(log), **RUN, "train.update": "summed"}),
    )  # fmt: skip
    assert done.returncode != 0
    assert "started with the update rule per_task with states of the tasks click, conversion" in done.stderr


def test_plain_tables_are_the_sums_of_lanes(run: Path, tables: PlainTables) -> None:
    found = saved(run, 6)
    assert len(tables.manifest.tables) == 6
    for table in tables.manifest.tables:
        lanes, kept = (table, f"{table}/conversion"), tables.table(table)
        weights = [t for n, t in found.items() if n.startswith("model.") and table_of(n) in lanes]
        states = [t for n, t in found.items() if n.endswith(".momentum1") and n.split(".")[-2] in lanes]
        assert len(weights) == len(states) == 2
        assert torch.equal(kept["weight"], sum(weights)) and torch.equal(kept["accumulator"], sum(states))


def test_a_snapshot_scores_like_the_run(run: Path) -> None:
    out = run.parent / "snapshots"
    done = tandemrec("export", "--run", str(run), "--out", str(out), "--attention-dtype", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "search's top K kept" in done.stdout and "100.00% bit-equal" in done.stdout
    evaluated = tandemrec("evaluate", "--run", str(run), "--split", "validation")
    assert evaluated.returncode == 0, evaluated.stderr


@pytest.mark.parametrize("rule", ["per_task", "summed"])
def test_another_run_starts_with_the_folded_tables(
    rule: str, log: Path, run: Path, tables: PlainTables
) -> None:
    """Lanes start from zero and all states fresh; without lanes, the states are those of all tasks."""
    out = log.parent / f"warm-{rule}"
    rates = {f"groups.{name}.learning_rate": 1e-12 for name in ("attention", "representation")}
    given = {"train.learning_rate": 1e-12, "train.max_steps": 1, "train.init_from": str(run), **rates}
    said = trained(log, out, {**SETTINGS, **RULE, **given, "train.update": rule})
    assert ("accumulators start fresh: each task has its own" in said) == (rule == "per_task")
    now = plain(out)
    assert now.manifest.tables == tables.manifest.tables
    for table in tables.manifest.tables:
        before, after = tables.table(table), now.table(table)
        assert torch.allclose(before["weight"], after["weight"], atol=1e-7)
        grown = bool((after["accumulator"] >= before["accumulator"]).all())
        assert grown == (rule == "summed") or not before["accumulator"].any()


def test_phases_may_differ_in_their_rule(log: Path) -> None:
    """Lanes rest while the rule is the plain one, and a reset leaves them at zero."""
    out = log.parent / "phases"
    phases = (
        '[{steps=3}, {steps=2, update="per_task"}, {steps=1, reset=["groups.attention"], freeze=["tables"]}]'
    )
    words = {"checkpoint.every_steps": 1, "checkpoint.keep": 6, "train.decay": "none"}
    done = tandemrec(
        "train", "--config", "configs/mmoe.toml", "--out", str(out), "--set", f"phases={phases}",
        *overrides({"data.log": str(log), **SETTINGS, **words}),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [step for step in range(1, 7) if "dominance" in lines_of(out)[step - 1]] == [4, 5]
    moved = {step: lanes_that_are_not_zero(saved(out, step)) for step in (3, 5, 6)}
    assert not moved[3] and {name.split("__")[0] for name in moved[5]} == {"attention", "representation"}
    assert moved[6] == {name for name in moved[5] if name.startswith("representation")}


def lanes_that_are_not_zero(found: dict[str, Tensor]) -> set[str]:
    weights = {table_of(name): tensor for name, tensor in found.items() if name.startswith("model.")}
    lanes = {table: tensor for table, tensor in weights.items() if table.endswith("/conversion")}
    assert len(lanes) == 6
    return {table for table, tensor in lanes.items() if tensor.any()}
