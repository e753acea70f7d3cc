"""Gradients by role: what is reported of them against plain autograd, on ranks, and that nobody notices."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor

from tests.helpers.launching import launched
from tests.helpers.models import batch_of, model_of, preset
from tests.helpers.per_task import PER_TASK, training
from tests.programs.preset_steps import small_config
from tests.programs.watched_gradients import CASES, WATCHED
from tests.trainer.test_presets import log_of_tasks
from trainer.model.frame import TwoStageModel
from trainer.ranks.process_group import process_group
from trainer.run_config import Config
from trainer.run_folder import on_board
from trainer.update.gradient_watch import mean_of, measured, smallest
from trainer.update.role_gradients import ROLES, RoleGradients, of_tables, row_gradients


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return log_of_tasks(tmp_path_factory.mktemp("tasks") / "log")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("twin_paper_dare", []),
        ("twin", ["model.lookup=full"]),
        ("stem_twin", ["model.lookup=full"]),
        ("adatask", [PER_TASK]),
    ],
)
def test_watching_changes_no_bit(log: Path, name: str, words: list[str]) -> None:
    """Roles share tables and lookups here, several branches read one lookup, tasks go backward one by one."""
    found = []
    with process_group() as ranks:
        for watched in ("train.watch_gradients=0", "train.watch_gradients=1"):
            made = training(small_config(name, log, *words, watched), ranks, log.parent)
            assert len(list(made.steps(3))) == 3
            assert ("gradients" in made.step.report()) == watched.endswith("1")
            found.append(made.sharded.model.state_dict())
    plain, watched_ = ({key: _bits(each) for key, each in state.items()} for state in found)
    assert plain == watched_


def _bits(weight: Any) -> bytes:
    if not isinstance(weight, Tensor):
        return b""
    shards = weight.local_shards() if hasattr(weight, "local_shards") else None
    parts = [weight] if shards is None else [shard.tensor for shard in shards]
    return b"".join(part.detach().contiguous().numpy().tobytes() for part in parts)


@pytest.mark.parametrize("name", ["twin_paper_dare", "dare", "twin", "stem_twin", "pepnet"])
@pytest.mark.parametrize("lookup", ["selected", "full"])
def test_roles_add_up_to_the_gradient_of_the_tables(log: Path, name: str, lookup: str) -> None:
    config = preset(name, log, f"model.lookup={lookup}")
    model, batch = model_of(config).train(), batch_of(config)
    taking = RoleGradients(model)
    with taking.taking() as taken:
        loss = model(batch).logits.square().sum()
    loss.backward()
    groups = model.lookups.groups
    rows = {spec.key: torch.arange(spec.rows) for group in groups.values() for spec in group.tables}
    of_roles = of_tables(taken, groups, rows)
    for group in groups.values():
        for spec in group.tables:
            table = group.table_name(spec)
            gradient = model.get_parameter(f"collections.{group.name}.{table}").grad
            roles = of_roles[table]
            if name == "dare":
                assert len(roles) == 1
            torch.testing.assert_close(sum(roles.values()).float(), gradient, rtol=1e-4, atol=1e-6)
    if name == "twin_paper_dare":
        assert all(set(roles) == set(ROLES) for roles in of_roles.values())
        # A feature of candidates alone is no part of the search.
        searched = [of_roles[f"shared__{feature}"] for feature in ("item_id", "category_id")]
        assert all(part.any() for roles in searched for part in roles.values())
    # Another forward pass is as without anybody watching.
    model(batch).logits.sum().backward()
    assert all(each.gradient is None or each.gradient.shape[0] > 0 for each in taken)


def test_attention_is_what_reaches_the_search_alone(log: Path) -> None:
    """The gradient of either role is that of the table where the other role has tables of its own."""
    twin = preset("twin_paper_dare", log, "model.lookup=full")
    gradients = []
    for config in (twin, preset("dare", log, "model.lookup=full")):
        model, batch = model_of(config).train(), batch_of(config)
        if not gradients:
            weights = dict(model.named_parameters())
        else:
            _copy(weights, model, config)
        with RoleGradients(model).taking() as taken:
            loss = model(batch).logits.square().sum()
        loss.backward()
        groups = model.lookups.groups
        rows = {spec.key: torch.arange(spec.rows) for group in groups.values() for spec in group.tables}
        gradients.append(of_tables(taken, groups, rows))
    one, two = gradients
    for role in ROLES:
        for feature in ("item_id", "category_id"):
            torch.testing.assert_close(one[f"shared__{feature}"][role], two[f"{role}__{feature}"][role])


def _copy(weights: dict[str, Any], model: TwoStageModel, config: Config) -> None:
    """Have both groups hold the weights of the one group."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            of = name
            for group in config.groups:
                of = of.replace(f"collections.{group}.{group}__", "collections.shared.shared__")
            weight.copy_(weights[of])


@given(seed=st.integers(0, 99), bags=st.integers(0, 9), rows=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_rows_get_the_gradients_of_their_bags(seed: int, bags: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, bags)
    ids, gradient = rng.integers(0, rows, lengths.sum()), rng.normal(size=(bags, 3)).astype(np.float32)
    chosen = np.flatnonzero(rng.random(rows) < 0.7)
    expected, place = np.zeros((rows, 3)), 0
    for bag, length in enumerate(lengths):
        for one in ids[place : place + length]:
            expected[one] += gradient[bag]
        place += length
    jagged = JaggedTensor(torch.from_numpy(ids), lengths=torch.from_numpy(lengths))
    found = row_gradients(jagged, torch.from_numpy(gradient), torch.from_numpy(chosen))
    np.testing.assert_allclose(found.numpy(), expected[chosen], atol=1e-12)


@given(seed=st.integers(0, 99), rows=st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_norms_and_conflict_follow_their_definition(seed: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    steps = [
        {table: {role: rng.integers(-1, 2, (rows, 2)).astype(float) for role in ROLES} for table in tables}
        for tables in [("a__x", "a__y")] * 2
    ]
    found = mean_of(
        [
            measured({t: {r: torch.from_numpy(g) for r, g in roles.items()} for t, roles in step.items()})
            for step in steps
        ]
    )
    assert found["steps"] == 2
    for unit, tables in {"a__x": ["a__x"], "groups.a": ["a__x", "a__y"]}.items():
        for role in ROLES if rows else ():
            norms = [math.hypot(*row) for step in steps for table in tables for row in step[table][role]]
            assert found["norm"][unit][role] == pytest.approx(np.mean(norms))
        means, shares = [], []
        for step in steps:
            pairs = [pair for table in tables for pair in zip(*step[table].values(), strict=True)]
            cosines = [a @ b / math.hypot(*a) / math.hypot(*b) for a, b in pairs if a.any() and b.any()]
            if cosines:
                means.append(np.mean(cosines))
                shares.append(np.mean([cosine < 0 for cosine in cosines]))
        assert (unit in found["cosine"]) == bool(means)
        if means:
            assert found["cosine"][unit] == pytest.approx(np.mean(means), abs=1e-12)
            assert found["conflict"][unit]["rows"] == pytest.approx(np.mean(shares))


def test_the_sample_is_the_same_however_it_is_found() -> None:
    """The smallest of the smallest of all parts are the smallest of the whole."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5000, 9000)
    parts = [smallest(part, 7, 100) for part in np.array_split(ids, 3)]
    assert set(smallest(np.concatenate(parts), 7, 100)) == set(smallest(ids, 7, 100))
    assert set(smallest(ids, 8, 100)) != set(smallest(ids, 7, 100))


def test_two_ranks_equal_one_and_shards_equal_whole_tables(log: Path, tmp_path: Path) -> None:
    found = {}
    cases = {1: ("twin", "by task"), 2: ("row-wise", "column-wise", "by task")}
    assert {case for some in cases.values() for case in some} == set(CASES)
    for ranks, names in cases.items():
        out = tmp_path / f"{ranks}.json"
        program = "tests.programs.watched_gradients"
        done = launched(program, str(log), str(out), *names, ranks=ranks, timeout=200)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found[ranks] = json.loads(out.read_text())
    whole = found[1]["twin"]
    _same(found[1]["by task"], found[2]["by task"])
    for name in ("row-wise", "column-wise"):
        _same(whole, found[2][name])
    assert whole["steps"] == 2 and set(whole["norm"]["shared__item_id"]) == set(ROLES)
    assert set(whole["cosine"]) == {"groups.shared", "shared__item_id", "shared__category_id"}
    # Two groups: nothing is shared.
    assert found[1]["by task"]["cosine"] == {}


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys() and one["cosine"].keys() == other["cosine"].keys()
    for unit, roles in one["norm"].items():
        assert roles == pytest.approx(other["norm"][unit], rel=1e-3)
    for unit, cosine in one["cosine"].items():
        assert cosine == pytest.approx(other["cosine"][unit], abs=1e-3)


def test_gradients_have_curves_of_their_own() -> None:
    found = {
        "norm": {"groups.a": {"attention": 0.5}}, "cosine": {"groups.a": -0.1},
        "conflict": {"groups.a": {"rows": 0.75, "steps": 1.0}}, "steps": 3,
    }  # fmt: skip
    assert dict(on_board("train", {"loss": 0.5, "gradients": found})) == {
        "train/loss": 0.5, "gradient norm/groups.a/attention": 0.5,
        "gradient cosine/groups.a": -0.1, "gradients in conflict/groups.a": 0.75,
    }  # fmt: skip
    assert WATCHED.endswith("2")
