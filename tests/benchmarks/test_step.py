"""`bench step` on made-up data, `bench scaling`: baselines train the same model on the same samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.inputs.cells import Cell, config_of
from benchmarks.inputs.synthetic import Draws, Shape, as_batch, padded, row_per_sample
from benchmarks.rivals.plain_models import PlainDare, PlainMlpScorer, plain_loss
from benchmarks.scaling import Point, peak_bytes
from benchmarks.scaling import config_of as scaled
from embeddings.lookup.plain import PlainBagCollection
from tests.helpers.launching import ROOT, tandemrec
from tests.helpers.models import draw, drawing
from trainer.assemble import build_model, resolve_groups
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.rows import UserRows
from trainer.model.frame import TwoStageModel
from trainer.model.retrieve.score import MlpScorer
from trainer.objectives.bce import loss_sum
from trainer.run_config import Config, load_config

SHAPE = Shape(items=90, categories=7, length=24, users=3, requests=4)


def small(model: str) -> Config:
    config = config_of(Cell(model=model, items=90, length=24, dim=4))  # type: ignore[arg-type]
    return config.model_copy(update={"model": config.model.model_copy(update={"k": 5})})


def drawn_model(config: Config, shape: Shape = SHAPE) -> tuple[TwoStageModel, dict[str, dict[str, Tensor]]]:
    """With random weights everywhere, and its tables by group and feature."""
    groups = resolve_groups(config, shape.manifest())
    rng = drawing(3)
    tables, collections = {}, {}
    for name, group in groups.items():
        drawn = {t.feature: torch.randn(t.rows, t.dim, generator=rng) for t in group.tables}
        weights = {group.table_name(t): drawn[t.feature] for t in group.tables}
        collections[name] = PlainBagCollection(group, weights)
        tables[name] = drawn
    model = build_model(config, groups, collections, resolve_tasks({}, ["click"]))
    for part in (model.head, model.branches):
        draw(part, rng)
    return model.eval(), tables


def layouts(rows: UserRows, config: Config) -> list[RequestBatch]:
    manifest = SHAPE.manifest()
    return [
        as_batch(rows, manifest, config.data, 4),
        as_batch(rows, manifest, config.data, 1),
        as_batch(row_per_sample(rows), manifest, config.data, 1),
    ]


@pytest.mark.parametrize("model", ["dare", "din"])
def test_all_layouts_hold_the_same_samples(model: str) -> None:
    config = small(model)
    trained, _ = drawn_model(config)
    batches = layouts(Draws(SHAPE, 5).step(), config)
    assert [batch.behaviors for batch in batches] == [3 * (24 + 15), 3 * 4 * 24, 3 * 4 * 3 * 24]
    with torch.no_grad():
        logits = [trained(batch).logits for batch in batches]
    assert logits[0].std() > 0.1
    for batch, found in zip(batches, logits, strict=True):
        torch.testing.assert_close(found, logits[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(batch.labels, batches[0].labels)


@pytest.mark.parametrize("published", [False, True])
def test_plain_pytorch_is_the_same_model(published: bool) -> None:
    config, rows = small("dare"), Draws(SHAPE, 5).step()
    # Some windows are shorter than L, one than K.
    rows = replace(rows, history_end=np.minimum(rows.history_end, np.array([3, 9, 20, 39] * 3)))
    trained, tables = drawn_model(config)
    counts = {name: info.rows for name, info in SHAPE.manifest().features.items()}
    plain = PlainDare(counts, 4, 24, 5, published=published)
    main = trained.branches["main"]
    for group in ("attention", "representation"):
        for table, weight in zip(getattr(plain, group), tables[group].values(), strict=True):
            table.weight.data.copy_(weight)
    plain.bias.data.copy_(main.scorer.bias.tables["position"])
    plain.position.data.copy_(main.sequence.time.tables["position"])
    plain.head.load_state_dict(trained.head.state_dict())
    history, target = (torch.from_numpy(part) for part in padded(rows, 24))
    batch = layouts(rows, config)[0]
    with torch.no_grad():
        expected, found = trained(batch).logits, plain(history, target)
        torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
        assert (found[1] is not None) == published
        total = loss_sum(expected, batch.labels, batch.weight) / batch.step_candidates
        torch.testing.assert_close(plain_loss((found[0], None), batch.labels), total)


def test_attention_of_every_pair_is_the_same_as_folded() -> None:
    config, rows = small("din"), Draws(SHAPE, 5).step()
    trained, _ = drawn_model(config)
    batch, branch = layouts(rows, config)[2], trained.branches["main"]
    folded = branch.scorer
    assert isinstance(folded, MlpScorer)
    with torch.no_grad():
        expected = trained(batch).logits
        branch.scorer = PlainMlpScorer(folded)
        torch.testing.assert_close(trained(batch).logits, expected, rtol=1e-4, atol=1e-4)
    assert branch.scorer.first.weight is folded.first.weight


def test_cells_are_the_presets() -> None:
    dare = load_config(ROOT / "configs" / "dare.toml", ["model.age=false"])
    assert config_of(Cell(items=90, length=24)).model == dare.model
    assert (
        config_of(Cell(model="din", items=90, length=24)).model
        == load_config(ROOT / "configs" / "din.toml").model
    )
    assert scaled(Point()).model == load_config(ROOT / "configs" / "dare.toml").model


def test_draws_are_popular_and_seeded() -> None:
    shape = Shape(items=1_000, categories=10, length=2_000, users=4)
    first, again, other = (Draws(shape, seed).step() for seed in (1, 1, 2))
    assert np.array_equal(first.history.ids, again.history.ids)
    assert not np.array_equal(first.history.ids, other.history.ids)
    items, counts = np.unique(first.history.ids[0], return_counts=True)
    assert items.min() >= 1 and items.max() <= 1_000
    # 1 / sum of rank^-1.05 up to 1,000 is 0.153; twice as rare from the first rank to the second.
    counts = np.sort(counts)[::-1] / counts.sum()
    assert counts[0] == pytest.approx(0.153, abs=0.02)
    assert counts[0] / counts[1] == pytest.approx(2**1.05, rel=0.15)
    wide = Draws(replace(shape, spread=50), 1).step()
    assert np.array_equal(wide.history.ids[0], 50 * first.history.ids[0])


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(4):
            torch.zeros(250_000)

    def at_once() -> list[Tensor]:
        return [torch.zeros(250_000) for _ in range(4)]

    assert 1_000_000 <= peak_bytes(one_after_the_other) < 1_100_000
    assert 4_000_000 <= peak_bytes(at_once) < 4_100_000


def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    report = tmp_path / "scaling.json"
    base = "base={length=20, k=4, dim=4, rows=50, touched=50, users=2}"
    sweeps = 'sweeps=[{size="rows", values=[50, 50000], limit=0}, {size="length", values=[20, 800]}]'
    words = ["--repeats", "1", "--set", base, "--set", sweeps, "--json", str(report)]
    done = tandemrec("bench", "scaling", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert [row["name"] for row in found["rows"]] == ["rows 50", "rows 50,000", "length 20", "length 800"]
    few, many, short, long = (row["bytes_a_sample"] for row in found["rows"])
    # The same ids in other rows start with other weights, so that other behaviors are kept.
    assert many == pytest.approx(few, rel=0.02) and long > 1.5 * short
    assert found["ratios"]["rows_memory_exponent"] == pytest.approx(0, abs=0.005)
    assert "seed 7" in done.stdout and "tandemrec bench scaling" in done.stdout


def test_bench_step_without_a_config(tmp_path: Path) -> None:
    report = tmp_path / "step.json"
    kinds = '"rows", "bare, 1", "ours, 1", "bare, blocks", "ours, blocks"'
    dare = f'{{items=90, length=20, dim=4, users=2, kinds=["plain", "published", {kinds}]}}'
    din = f'{{model="din", items=90, length=20, dim=4, users=2, kinds=["plain attention", {kinds}]}}'
    words = ["--repeats", "2", "--set", f"cells=[{dare}, {din}]", "--set", "slow_repeats=1"]
    done = tandemrec("bench", "step", *words, "--json", str(report))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert len(found["rows"]) == 7 + 6
    assert [row["n"] for row in found["rows"][:3]] == [1, 1, 2]
    assert all(row["samples_per_cpu_s"] > 0 for row in found["rows"])
    names = {name.rpartition(": ")[2] for name in found["ratios"]}
    assert names == {
        "ours_to_plain",
        "ours_to_published_form",
        "ours_to_plain_attention",
        "ours_to_bare",
        "ours_to_bare_1",
        "ours_to_rows",
        "blocks_to_1",
    }
