"""Snapshots of models with several sets of tables: written, compared, and continued by deltas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings.errors import SnapshotError
from tests.helpers.logs import Shape, enrich, random_rows, small_log, write_log
from tests.helpers.snapshots import exported, save_run
from trainer.sealed_folder import MANIFEST
from trainer.snapshot.code import _is_one_branch, _ranked, _Ranking
from trainer.snapshot.loading import load_search, load_snapshot
from trainer.snapshot.manifest import SEAL

SETS = "groups.representation.sets={all = {}, slim = {dim = 4}, own = {}}"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_log(tmp_path_factory.mktemp("log") / "log")


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("run") / "run", log, "dare", SETS)


@pytest.fixture(scope="module")
def version(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(run, tmp_path_factory.mktemp("snapshot") / "out")


def test_sets_are_stored_and_score_as_the_trainer_does(run: Path, version: Path) -> None:
    """Bit for bit in fp32; each set's rows are the trainer's own."""
    snapshot = load_snapshot(version)
    assert snapshot.self_check() == 0.0
    tables = snapshot.manifest.groups["representation"]
    assert [(table.set, table.feature, table.dim) for table in tables] == [
        (name, feature, dim)
        for name, dim in (("all", 8), ("slim", 4), ("own", 8))
        for feature in ("item_id", "category_id")
    ]
    group = snapshot.model.lookups.groups["representation"]
    assert [(each.name, each.owner) for each in group.sets] == [
        ("all", "shared"),
        ("slim", "shared"),
        ("own", "shared"),
    ]
    assert {table.set for table in snapshot.manifest.groups["attention"]} == {""}
    stored = dict(snapshot.model.collections["representation"].named_buffers())
    assert not torch.equal(stored["representation/all/item_id"], stored["representation/own/item_id"])
    # The search reads the attention, which has no sets.
    assert load_search(version)[0].reason == "" and len(load_search(version)[1]) == 2


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_sets_are_stored_in_narrow_types(run: Path, tmp_path: Path, dtype: str) -> None:
    tables = load_snapshot(exported(run, tmp_path / "out", dtype, "fp32")).manifest.groups
    assert {table.dtype for table in tables["representation"]} == {dtype}


def test_a_delta_holds_the_rows_of_the_set_that_changed(log: Path, run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path / "out")

    def change(weights: dict[str, Tensor]) -> None:
        weights["representation/slim/item_id"][[3, 7]] += 0.25

    later = save_run(tmp_path / "later", log, "dare", SETS, step=2, change=change)
    delta, full = exported(later, tmp_path / "out", since="1"), exported(later, tmp_path / "full")
    held = {(t.set, t.feature): t.held for t in load_snapshot(delta).manifest.groups["representation"]}
    assert held == {
        (name, feature): 2 * (name == "slim" and feature == "item_id")
        for name in ("all", "slim", "own")
        for feature in ("item_id", "category_id")
    }
    recorded = load_snapshot(full).recorded.batch
    assert torch.equal(load_snapshot(delta).score(recorded), load_snapshot(full).score(recorded))
    # Other sets are other tables: nothing of the base is taken for theirs.
    other = save_run(tmp_path / "other", log, "dare", "groups.representation.sets=3")
    tables = load_snapshot(exported(other, tmp_path / "out", since="1")).manifest.groups["representation"]
    assert all(table.changed is None for table in tables)


def _renamed(tables: list[dict[str, Any]]) -> None:
    for table in tables[:2]:
        table["set"] = "alle"


def _interleaved(tables: list[dict[str, Any]]) -> None:
    tables[1], tables[2] = tables[2], tables[1]


def _unset(tables: list[dict[str, Any]]) -> None:
    for table in tables:
        del table["set"]


@pytest.mark.parametrize("edit", [_renamed, _interleaved, _unset, lambda tables: tables.pop()])
def test_manifests_that_misname_sets_are_refused(
    version: Path, edit: Callable[[list[dict[str, Any]]], object]
) -> None:
    """Columns go by the order of tables and the names by the sets: neither may differ from the config's."""
    before = (version / MANIFEST).read_text()
    tree = json.loads(before)
    edit(tree["groups"]["representation"])
    try:
        SEAL.write(version, json.dumps(tree))
        with pytest.raises(SnapshotError):
            load_snapshot(version)
    finally:
        SEAL.write(version, before)
    assert load_snapshot(version).self_check() == 0.0


def test_owners_of_domains_meet_their_own_ids_when_export_compares(log: Path, tmp_path: Path) -> None:
    """The trainer's model over few rows numbers ids anew, but no domains."""
    owner = '{all = {}, far = {owner = "domain:99"}}'
    words = [f"groups.representation.sets={owner}", "data.domain=item_id", "tables.item_id.rows=100"]
    run = save_run(tmp_path / "run", log, "dare", *words, "model.head=experts")
    assert load_snapshot(exported(run, tmp_path / "out", parity_requests=1)).self_check() == 0.0


def test_stage_two_of_several_sets_is_a_function_of_what_was_kept(version: Path) -> None:
    """What `export --aoti` compiles reads the vectors of all sets side by side."""
    snapshot = load_snapshot(version)
    assert _is_one_branch(snapshot.model)
    with torch.no_grad():
        given, expected = _ranked(snapshot)
        found = _Ranking(snapshot.model)(*given.values())
    assert torch.allclose(found, expected, rtol=0, atol=1e-6) and expected.std() > 1e-3


@pytest.mark.parametrize("preset", ["esmm", "stem", "ame"])
def test_stage_two_of_experts_is_a_function_of_what_was_kept(log: Path, preset: str, tmp_path: Path) -> None:
    """The same for towers, gates and products of tasks."""
    tasks = (
        "tasks={a = {label = 'click'}, b = {label = 'click'}, both = {label = 'click', product = ['a', 'b']}}"
    )
    run = save_run(tmp_path / "run", log, preset, tasks, "model.k=4")
    snapshot = load_snapshot(exported(run, tmp_path / "out"))
    assert _is_one_branch(snapshot.model)
    with torch.no_grad():
        given, expected = _ranked(snapshot)
        found = _Ranking(snapshot.model)(*given.values())
    assert torch.allclose(found, expected, rtol=0, atol=1e-6) and expected.std() > 1e-3
    assert torch.allclose(found[:, 2], found[:, 0] * found[:, 1], atol=1e-6)


def test_tasks_that_change_places_are_refused(tmp_path: Path) -> None:
    """Scores are told apart by the names in the manifest, and computed by those in its config."""
    rows = {"train": enrich(random_rows(5), 5), "validation": enrich(random_rows(6), 6)}
    log = write_log(tmp_path / "log", rows, rich=True)
    run = save_run(tmp_path / "run", log, "dare", "tasks={click = {}, buy = {}}")
    version = exported(run, tmp_path / "out", parity_requests=1)
    assert load_snapshot(version).manifest.tasks == ("click", "buy")
    tree = json.loads((version / MANIFEST).read_text())
    SEAL.write(version, json.dumps({**tree, "tasks": ["buy", "click"]}))
    with pytest.raises(SnapshotError, match="its tasks are buy, click, and its config has click, buy"):
        load_snapshot(version)


def test_a_config_without_its_domain_names_the_snapshot(log: Path, tmp_path: Path) -> None:
    words = [
        "model.head=experts",
        'model.mixer={kind = "softmax", per = "domain"}',
        "data.domain=category_id",
    ]
    run = save_run(tmp_path / "run", log, "dare", *words)
    version = exported(run, tmp_path / "out", parity_requests=1)
    tree = json.loads((version / MANIFEST).read_text())
    tree["config"]["data"]["domain"] = ""
    SEAL.write(version, json.dumps(tree))
    with pytest.raises(SnapshotError) as caught:
        load_snapshot(version)
    assert str(caught.value).startswith(
        f"{version / MANIFEST}: its config contradicts itself: model.mixer.per"
    )


def test_a_manifest_with_a_bad_set_is_refused_in_one_sentence(version: Path) -> None:
    before = (version / MANIFEST).read_text()
    tree = json.loads(before)
    tree["config"]["groups"]["representation"]["sets"] = "four"
    try:
        SEAL.write(version, json.dumps(tree))
        with pytest.raises(SnapshotError) as caught:
            load_snapshot(version)
    finally:
        SEAL.write(version, before)
    assert str(caught.value).startswith(
        f"{version / MANIFEST}: config.groups.representation.sets: must be a whole number, 'tasks' or a table"
    )


def test_sets_of_tasks_find_their_tasks_again(tmp_path: Path) -> None:
    """STEM's form: a set for each task, and experts that read their own one."""
    rows = {
        split: enrich(random_rows(seed, Shape(users=8)), seed)
        for seed, split in enumerate(("train", "validation"))
    }
    log = write_log(tmp_path / "log", rows, rich=True)
    words = [
        "groups.representation.sets=tasks",
        'groups.representation.features=["item_id"]',
        "model.head=experts",
        'model.experts={own = 1, foreign = "stopped"}',
        'model.mixer={kind = "softmax"}',
    ]
    run = save_run(tmp_path / "run", log, "dare", *words)
    snapshot = load_snapshot(exported(run, tmp_path / "out", parity_requests=3))
    assert snapshot.self_check() == 0.0 and snapshot.manifest.tasks == ("click", "buy")
    group = snapshot.model.lookups.groups["representation"]
    owners = {"shared": "shared", "click": "task:click", "buy": "task:buy"}
    assert {each.name: each.owner for each in group.sets} == owners
    assert [table.set for table in snapshot.manifest.groups["representation"]] == [*owners]
