"""Plain tables, and new runs that start from them or from another run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open

from embeddings.errors import CheckpointError, DataError
from pipelines.train import run as train_run
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import FEATURES, small_log
from tests.helpers.tables import whole_tensor
from tests.helpers.vocabularies import all_large
from tests.trainer.test_ranks import parameters
from trainer.assemble import build_sharded
from trainer.checkpoint import warm_start
from trainer.checkpoint.dense_start import TaskHeads
from trainer.checkpoint.plain_ids import PlainIds
from trainer.checkpoint.unsharded import open_plain_tables
from trainer.checkpoint.warm_start import fill, open_source, unshard_run
from trainer.config.tasks import resolve_tasks
from trainer.log.schema import read_manifest
from trainer.log.writer import write_manifest
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config, load_config
from trainer.update.step import make_optimizer

TABLE = "representation__item_id"
WEIGHT = f"model.collections.representation.embedding_bags.{TABLE}.weight"
STATE = f"optim.state.fused.{WEIGHT.removeprefix('model.')}.{TABLE}.momentum1"


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[Ranks]:
    with process_group() as ranks:
        yield ranks


def config(log: Path, **changes: Any) -> Config:
    words = {**SETTINGS, "data.log": str(log), "train.max_steps": 4}
    words |= {k.replace("__", "."): v for k, v in changes.items()}
    return load_config(Path("configs/dare.toml"), overrides(words)[1::2])


def name_items(log: Path, values: list[str]) -> Path:
    """Give a log's items names: the first is that of id 1."""
    manifest = read_manifest(log)
    content = hashlib.sha256("".join(f"{value}\n" for value in values).encode()).hexdigest()
    table = pa.table({"value": values, "id": range(1, len(values) + 1)})
    pq.write_table(table, log / "vocab" / "item_id.parquet")
    info = manifest.features["item_id"].model_copy(update={"vocabulary": content, "rows": len(values) + 1})
    write_manifest(log, manifest.model_copy(update={"features": {**manifest.features, "item_id": info}}))
    return log


NAMES = [f"item {n}" for n in range(1, FEATURES["item_id"])]
# Three have gone, the rest moved, seven are new among and behind them.
NEWER = ["new a", *reversed(NAMES[3:]), *[f"new {c}" for c in "bcdefg"]]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """A trained run."""
    root = tmp_path_factory.mktemp("old")
    train_run(config(name_items(small_log(root / "log", seed=1), NAMES)), root / "run", ranks)
    return root


@pytest.fixture(scope="module")
def plain(old: Path) -> Path:
    unshard_run(old / "run", old / "plain")
    return old / "plain"


def filled(
    config: Config, source: Path, ranks: Ranks, carry: bool = True, given: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Weights and accumulators of a new run, whole, and what it was told."""
    manifest = read_manifest(config.data.log)
    sharded = build_sharded(config, manifest, ranks)
    optimizer = make_optimizer(sharded.model, config.train)
    tensors = {"model": sharded.model.state_dict(), "optim": optimizer.state_dict()}
    with open_source(source, source.parent / "scratch.tmp") as tables:
        heads = TaskHeads.of(config.model, resolve_tasks(config.tasks, manifest.tasks))
        lines = fill(tensors, tables, config.data.log, manifest, heads, carry, given=given)
    assert not (source.parent / "scratch.tmp").exists()
    state = tensors["optim"]["state"][STATE.split(".state.", 1)[1].rsplit(f".{TABLE}.m", 1)[0]]
    accumulator = state[f"{TABLE}.momentum1"].local_shards()[0].tensor
    whole = {f"model.{name}": whole_tensor(t).clone() for name, t in sharded.model.state_dict().items()}
    return {**whole, STATE: accumulator.clone()}, lines


def test_plain_tables_hold_what_was_trained(old: Path, plain: Path) -> None:
    trained = parameters(old / "run")
    with safe_open(plain / "tables" / f"{TABLE}.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("weight"), trained[WEIGHT])
        assert torch.equal(file.get_tensor("accumulator"), trained[STATE])
    found = open_plain_tables(plain)
    assert set(found.manifest.tables) == {
        f"{g}__{f}" for g in ("attention", "representation") for f in FEATURES
    }
    assert found.manifest.tables[TABLE].accumulator == "row" and found.manifest.step == 4
    for name, weight in found.dense().items():
        assert torch.equal(weight, trained[f"model.{name}"]), name
    assert not list(old.glob("*.tmp*"))


def test_the_same_vocabulary_gives_the_same_bits(
    old: Path, plain: Path, ranks: Ranks, tmp_path: Path
) -> None:
    other = name_items(small_log(tmp_path / "log", seed=2), NAMES)
    trained = parameters(old / "run")
    for source in (plain, old / "run"):
        tensors, lines = filled(config(other), source, ranks)
        assert "item_id: the same vocabulary" in lines
        for name, tensor in tensors.items():
            assert torch.equal(tensor, trained[name]), name
    assert float(trained[STATE].sum()) > 0
    assert not filled(config(other), plain, ranks, carry=False)[0][STATE].any()


def test_rows_of_a_file_are_not_those_of_the_source(
    old: Path, plain: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Vectors of two files may have nothing in common: old rows beside new ones would mean nothing."""
    other = config(name_items(small_log(tmp_path / "log", seed=2), NAMES))
    first = build_sharded(other, read_manifest(other.data.log), ranks).model.state_dict()
    trained, (tensors, lines) = parameters(old / "run"), filled(other, plain, ranks, given={"attention"})
    for name, weight in first.items():
        of_file = name.startswith("collections.attention.")
        wanted = whole_tensor(weight) if of_file else trained[f"model.{name}"]
        assert torch.equal(tensors[f"model.{name}"], wanted), name
    assert any(
        line.startswith("not taken over, since their rows are those of a file: attention__") for line in lines
    )


def test_sets_are_unsharded_and_start_those_of_their_own_names(
    old: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """No set starts from another one, nor from the one table that a run without sets has."""
    log = old / "log"
    several = config(log, groups__representation__sets=2)
    train_run(several, tmp_path / "run", ranks)
    manifest, trained = unshard_run(tmp_path / "run", tmp_path / "plain"), parameters(tmp_path / "run")
    assert manifest.version == 2
    name = "representation/1/item_id"
    weight = f"model.collections.representation.embedding_bags.{name}.weight"
    assert manifest.tables[name].feature == "item_id" and manifest.tables[name].group == "representation"
    saved = open_plain_tables(tmp_path / "plain").table(name)
    assert torch.equal(saved["weight"], trained[weight])
    tensors = filled_tables(several, tmp_path / "plain", ranks)
    assert all(torch.equal(tensors[key], trained[f"model.{key}"]) for key in tensors)
    for changed, source in (
        (several, old / "run"),
        (config(log, groups__representation__sets=3), tmp_path / "plain"),
    ):
        with pytest.raises(CheckpointError, match="a table of a set starts from that of the same set"):
            filled_tables(changed, source, ranks)


def test_a_new_tasks_set_starts_anew_beside_those_of_old_ones(
    old: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """STEM with one task more: its tables and their sequence model are its own, as its tower is."""
    form: dict[str, Any] = {
        "tasks__click__weight": 1.0,
        "groups__representation__sets": "tasks",
        "model__head": "experts",
        "model__experts__own": 1,
    }
    train_run(config(old / "log", **form), tmp_path / "run", ranks)
    trained = parameters(tmp_path / "run")
    more = config(old / "log", **form, tasks__again__label="click")
    tensors = filled_tables(more, tmp_path / "run", ranks)
    first = build_sharded(more, read_manifest(more.data.log), ranks).model.state_dict()
    tables = [name for name in tensors if "/" in name]
    assert len(tables) == 6
    for name in [*tables, *(name for name in tensors if ".sequences." in name)]:
        new = "/again/" in name or ".sequences.again." in name
        assert torch.equal(tensors[name], whole_tensor(first[name]) if new else trained[f"model.{name}"]), (
            name
        )
    # What no task owns must be there.
    shared = config(old / "log", **{**form, "groups__representation__sets": 2})
    with pytest.raises(
        CheckpointError,
        match=r"has no table representation/0/category_id; it has .* no other: name "
        r"groups\.representation\.sets as they are there, or train without train\.init_from",
    ):
        filled_tables(shared, tmp_path / "run", ranks)


def filled_tables(config: Config, source: Path, ranks: Ranks) -> dict[str, torch.Tensor]:
    manifest = read_manifest(config.data.log)
    sharded = build_sharded(config, manifest, ranks)
    optimizer = make_optimizer(sharded.model, config.train)
    tensors = {"model": sharded.model.state_dict(), "optim": optimizer.state_dict()}
    with open_source(source, source.parent / "scratch.tmp") as tables:
        tasks = resolve_tasks(config.tasks, manifest.tasks)
        heads = TaskHeads.of(config.model, tasks, sharded.groups)
        fill(tensors, tables, config.data.log, manifest, heads, carry=True)
    return {name: whole_tensor(tensor) for name, tensor in sharded.model.state_dict().items()}


@pytest.mark.parametrize("large", [False, True])
def test_rows_follow_their_values_into_another_vocabulary(
    old: Path, plain: Path, ranks: Ranks, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = config(name_items(small_log(tmp_path / "log", seed=3), NEWER))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with all_large() if large else nullcontext():
        tensors, lines = filled(newer, plain, ranks)
    assert (tmp_path / "home" / ".cache" / "tandemrec" / "vocabularies").is_dir() == large
    assert "item_id: 56 of 59 values carried over, 7 new" in lines
    trained, fresh = parameters(old / "run"), build_sharded(newer, read_manifest(newer.data.log), ranks)
    first = {f"model.{name}": whole_tensor(t) for name, t in fresh.model.state_dict().items()}
    assert torch.equal(tensors[WEIGHT][0], trained[WEIGHT][0])
    for row, value in enumerate(NEWER, start=1):
        if value in NAMES:
            source = NAMES.index(value) + 1
            assert torch.equal(tensors[WEIGHT][row], trained[WEIGHT][source]), value
            assert tensors[STATE][row] == trained[STATE][source]
        else:
            assert torch.equal(tensors[WEIGHT][row], first[WEIGHT][row]), value
            assert tensors[STATE][row] == 0


def test_ids_that_come_and_go_are_not_those_of_another_vocabulary(
    plain: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Dense ids may come and go, too, and in a newer log they name other items."""
    log = name_items(small_log(tmp_path / "log", seed=3), NEWER)
    newer = config(log, ids__item_id__capacity=52, ids__item_id__shared_rows=8)
    tensors = {"model": build_sharded(newer, read_manifest(log), ranks).model.state_dict()}
    ids = {"item_id": PlainIds(capacity=52, shared_rows=8, live=0, clock=(0, 0))}
    with open_source(plain, tmp_path / "scratch.tmp") as tables:
        known = replace(tables, manifest=tables.manifest.model_copy(update={"ids": ids}))
        heads = TaskHeads.of(newer.model, resolve_tasks(newer.tasks, read_manifest(log).tasks))
        with pytest.raises(CheckpointError, match=r"ids of item_id stand for other values .* ingest both"):
            fill(tensors, known, log, read_manifest(log), heads, True, newer.id_rules)


def test_a_run_starts_from_another_and_then_keeps_to_itself(
    old: Path, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = name_items(small_log(tmp_path / "log", seed=3), NEWER)
    start = {"train__init_from": str(old / "run"), "checkpoint__every_steps": 2}
    train_run(config(newer, **start), tmp_path / "run", ranks)
    said = capsys.readouterr().out
    assert f"weights from {old / 'run'}, step 4" in said and "56 of 59 values carried over" in said
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    other = {**start, "groups__representation__dim": 16}
    with pytest.raises(CheckpointError) as caught:
        train_run(config(newer, **other), tmp_path / "other", ranks)
    assert str(caught.value).startswith(f"{old / 'run'}: ")
    gone = {**start, "train__init_from": str(tmp_path / "gone"), "train__max_steps": 6}
    train_run(config(newer, **gone), tmp_path / "run", ranks)
    assert "resumed from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups__representation__dim": 16},
            r"dense weight .* this model's is|is 8 wide, the config says 16",
        ),
        ({"model__hidden": [16]}, r"dense weight .* is \(8.*this model's is"),
    ],
)
def test_another_shape_is_refused(
    old: Path, plain: Path, ranks: Ranks, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        filled(config(old / "log", **changes), plain, ranks)


def test_a_feature_that_was_not_trained_is_named(old: Path, ranks: Ranks, tmp_path: Path) -> None:
    features = {"groups__attention__features": ["item_id"], "groups__representation__features": ["item_id"]}
    train_run(config(old / "log", **features), tmp_path / "run", ranks)
    unshard_run(tmp_path / "run", tmp_path / "plain")
    with pytest.raises(
        CheckpointError, match=r"has no table attention__category_id; it has attention__item_id"
    ):
        filled(config(old / "log"), tmp_path / "plain", ranks)


def test_ids_without_names_must_not_be_guessed(old: Path, plain: Path, ranks: Ranks, tmp_path: Path) -> None:
    nameless = small_log(tmp_path / "log", seed=2)
    with pytest.raises(DataError, match="only one of the two logs says what its ids stand for"):
        filled(config(nameless), plain, ranks)


def test_damage_is_refused_and_named(plain: Path) -> None:
    for file in sorted(p for p in plain.rglob("*") if p.is_file()):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=str(file)):
            open_plain_tables(plain)
        file.write_bytes(content)
    open_plain_tables(plain)


@pytest.mark.parametrize("rank", range(5))
def test_of_a_store_one_rank_of_each_other_machine_verifies_the_copy(
    tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has verified its own; what takes long is done where ranks wait for each other for any length."""
    done, answers = list[tuple[int, bool]](), {warm_start.this_machine: [*"aabba"]}
    turns = list[bool]()

    def every(compute: Callable[[], Any], slow: bool = False) -> list[Any]:
        if compute in answers:
            return answers[compute]
        assert compute() is None and slow
        turns.append(slow)
        return [None] * 5

    def opened(path: Path, check: bool = True) -> SimpleNamespace:
        done.append((len(turns), check))
        return SimpleNamespace(path=path)

    monkeypatch.setattr(warm_start, "from_every_rank", every)
    monkeypatch.setattr(warm_start, "open_plain_tables", opened)
    monkeypatch.setattr(warm_start, "is_remote", lambda path: True)
    monkeypatch.setattr(warm_start.dist, "get_rank", lambda: rank)
    warm_start._open_on_all(tmp_path)
    # When, and whether all is read: the first of a machine before the others.
    assert done == [[(0, False), (1, False), (0, True), (1, False), (1, False)][rank]] and len(turns) == 2


def test_nothing_is_overwritten(old: Path, plain: Path) -> None:
    with pytest.raises(CheckpointError, match="is there already"):
        unshard_run(old / "run", plain)
