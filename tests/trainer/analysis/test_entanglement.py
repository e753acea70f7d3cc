"""Spaces, their correlations and gates against plain numpy; a planted disentanglement is seen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.models import batch_of, model_of, preset, small_log
from tests.trainer.test_presets import log_of_tasks
from trainer.analysis.entanglement import (
    Gate,
    Space,
    correlation,
    joined_gates,
    mean_with_interval,
    pair_groups,
    principal,
    spaces_of,
)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("tasks") / "log")


@pytest.mark.parametrize(
    ("name", "spaces"),
    [
        ("dare", {"attention", "representation"}),
        ("twin_paper_dare", {"representation"}),
        ("stem", {f"representation / {name}" for name in ("shared", "click", "conversion")} | {"attention"}),
        ("td_sasrec", {"representation"}),
    ],
)
def test_spaces_hold_each_candidates_vector_and_the_weighted_sum_of_what_it_keeps(
    log: Path, tmp_path: Path, name: str, spaces: set[str]
) -> None:
    # Features of both sides alone, so that a loop over them is short.
    config = preset(name, small_log(tmp_path / "log") if name == "dare" else log)
    model, batch = model_of(config).eval(), batch_of(config)
    found, gates = spaces_of(model, batch)
    assert set(found) == spaces
    for space in found.values():
        assert len(space.user) == len(space.item) == batch.candidates
        assert space.user.shape == space.item.shape
    if name == "stem":
        assert gates and all(gate.candidates == batch.candidates for gate in gates.values())
        assert all(sum(gate.weights.values()) == pytest.approx(1, abs=1e-4) for gate in gates.values())
    if name == "dare":
        _follows_by_loops(model, batch, found)


def _follows_by_loops(model: Any, batch: Any, found: dict[str, Space]) -> None:
    """DARE candidate by candidate: rows of tables, weights by the search's own scores."""
    with torch.no_grad():
        (main,) = model.retrieve(batch).values()
        weight_CK = model.branches["main"].weigh(main)[:, 0]
    for group, space in found.items():
        tables = [
            model.get_parameter(f"collections.{group}.{model.lookups.groups[group].table_name(spec)}")
            for spec in model.lookups.groups[group].tables
        ]
        keys = [spec.key for spec in model.lookups.groups[group].tables]
        vectors = torch.cat(
            [table[batch.features[key].values()] for table, key in zip(tables, keys, strict=True)],
            dim=1,
        ).detach()
        n = batch.behaviors
        np.testing.assert_allclose(space.item, vectors[n:].numpy(), rtol=1e-5)
        for c in range(len(space.user)):
            expected = sum(
                (
                    float(w) * vectors[int(i)]
                    for w, i in zip(weight_CK[c], main.selection.index[c], strict=True)
                ),
                torch.zeros(vectors.shape[1]),
            )
            np.testing.assert_allclose(space.user[c], expected.numpy(), atol=1e-4)


@given(seed=st.integers(0, 99), rows=st.integers(0, 8), constant=st.booleans())
@settings(max_examples=25, deadline=None)
def test_correlations_are_pearsons(seed: int, rows: int, constant: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))
    if constant:
        a[:, 0] = 1.5
    expected = [
        abs(np.corrcoef(a[:, i], b[:, j])[0, 1])
        for i in range(3)
        for j in range(2)
        if rows > 1 and a[:, i].std() > 1e-12
    ]
    found = correlation(a, b)
    assert math.isnan(found) if not expected else found == pytest.approx(np.mean(expected))


def test_a_disentangled_pair_of_spaces_parts_what_tasks_disagree_about() -> None:
    rng = np.random.default_rng(0)
    labels = {"click": rng.integers(0, 2, 400).astype(float), "buy": rng.integers(0, 2, 400).astype(float)}
    labels["buy"][:5] = np.nan
    groups = pair_groups(labels)
    assert set(groups) == {"click and buy", "click alone", "buy alone", "neither"}
    assert sum(chosen.sum() for chosen in groups.values()) == 395
    user = rng.normal(size=(400, 4))
    means = {}
    for task, label in labels.items():
        space = Space(user, np.where(np.nan_to_num(label)[:, None] > 0, user, -user))
        means[task] = [mean_with_interval(space.cosines()[groups[f"{of} alone"]])[0] for of in labels]
    assert means["click"] == pytest.approx([1, -1]) and means["buy"] == pytest.approx([-1, 1])
    one = pair_groups({"click": labels["click"]})
    assert set(one) == {"click", "not click"}
    assert math.isnan(mean_with_interval(np.array([np.nan]))[0])
    assert np.isnan(Space(np.zeros((1, 2)), np.ones((1, 2))).cosines()).all()


def test_gates_of_batches_count_by_candidate() -> None:
    parts = [
        {"0/task:a": Gate({"x": 1.0, "y": 0.0}, 0.0, 1)},
        {"0/task:a": Gate({"x": 0.0, "y": 1.0}, 0.4, 3)},
    ]
    gate = joined_gates(parts)["0/task:a"]
    assert gate.weights == {"x": 0.25, "y": 0.75} and gate.entropy == pytest.approx(0.3)
    assert gate.candidates == 4


@given(seed=st.integers(0, 50), rows=st.integers(1, 7), width=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_principal_components_keep_what_two_dimensions_can(seed: int, rows: int, width: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(rows, width))
    where, shares = principal(vectors)
    values = np.linalg.eigvalsh(np.atleast_2d(np.cov(vectors.T, bias=True)))[::-1]
    np.testing.assert_allclose(where.var(axis=0)[: min(2, width)], values[:2].clip(0), atol=1e-9)
    assert shares.sum() <= 1 + 1e-9
    if values.sum() > 1e-9:
        assert shares[0] == pytest.approx(values[0] / values.sum())
