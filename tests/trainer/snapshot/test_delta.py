"""Deltas: base and deltas are what a full export is, and a broken chain never loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import StoredTable
from pipelines.export_version import _base_step
from tests.helpers.launching import tandemrec
from tests.helpers.models import preset, small_log
from tests.helpers.snapshots import Change, exported, publish_copy, save_run
from trainer.checkpoint.tensors import TensorReader
from trainer.run_folder import RunFolder
from trainer.snapshot import load_search, load_snapshot
from trainer.snapshot.chain import Chain, read_chain
from trainer.snapshot.fetching import fetched
from trainer.snapshot.writing import Source
from trainer.storage import place

KINDS = [("fp32", "fp32"), ("int8", "fp16")]


def changing(rows: list[int], dense: float = 0.0) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        for name in ("attention__item_id", "representation__item_id"):
            weights[name][rows] += 0.25
        weights["head.layers.1.bias"].add_(dense)

    return change


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same model four times: as it began, with rows changed twice, with a longer and a shorter table."""
    folder = tmp_path_factory.mktemp("runs")
    log = small_log(folder / "log")
    first, second = changing([3, 7]), changing([7, 8, 59], dense=0.1)

    def both(weights: dict[str, Tensor]) -> None:
        first(weights)
        second(weights)

    changes = (None, first, both, both, both)
    rows = (62, 62, 62, 90, 61)
    return [
        save_run(folder / f"run{i}", log, "dare", f"tables.item_id.rows={n}", change=change, step=i + 1)
        for i, (change, n) in enumerate(zip(changes, rows, strict=True))
    ]


def tables(version: Path) -> dict[str, Tensor]:
    snapshot = load_snapshot(version)
    found = {f"dense.{name}": tensor for name, tensor in snapshot.model.state_dict().items()}
    for group in snapshot.model.collections.values():
        names = [group.group.table_name(table) for table in group.group.tables]
        found |= {name: everything(getattr(group, name)) for name in names}
    return found | {f"search.{key}": everything(rows) for key, rows in load_search(version)[1].items()}


def everything(stored: StoredTable) -> Tensor:
    return (
        stored.index_select(0, torch.arange(stored.shape[0]))
        if isinstance(stored, Tensor)
        else stored.index_select(torch.arange(stored.rows))
    )


@pytest.mark.parametrize("kinds", KINDS)
def test_base_and_deltas_equal_a_full_export(
    runs: list[Path], tmp_path: Path, kinds: tuple[str, str]
) -> None:
    versions = [exported(runs[0], tmp_path / "deltas", *kinds)]
    for run in runs[1:]:
        versions.append(exported(run, tmp_path / "deltas", *kinds, since=versions[-1].name))
    assert len(read_chain(versions[-1]).versions) == len(runs)
    for i, run in enumerate(runs):
        full = exported(run, tmp_path / f"full{i}", *kinds)
        found, wanted = tables(versions[i]), tables(full)
        assert found.keys() == wanted.keys() and len(found) > 10
        for name, tensor in wanted.items():
            assert tensor.dtype == found[name].dtype and torch.equal(tensor, found[name]), name
        recorded = load_snapshot(full).recorded.batch
        assert torch.equal(load_snapshot(versions[i]).score(recorded), load_snapshot(full).score(recorded))
    # Each holds what changed and no more; loading a later one left the files of its base as they were.
    held = [load_snapshot(v).manifest.groups["attention"][0].held for v in versions]
    assert held == [62, 2, 3, 28, 0]
    assert load_snapshot(versions[0]).self_check() <= 0.2


def test_scattered_rows_are_read_together() -> None:
    """A read costs as much as the megabyte that it leaps over: reads are no more than megabytes."""
    reads: list[tuple[int, int]] = []

    def rows(name: str, start: int, stop: int) -> Tensor:
        reads.append((start, stop))
        return torch.arange(start, stop)[:, None].expand(-1, 8)

    shape, dtype = (lambda name: (2_000_000, 8)), (lambda name: torch.float32)
    reader = SimpleNamespace(table=lambda group, table: table, shape=shape, dtype=dtype, rows=rows)
    source = Source(None, {}, reader)  # type: ignore[arg-type]
    # Of 64 MB, a row each 20 kB, and two that are far from all others.
    ids = torch.cat([torch.arange(0, 1_000_000, 640), torch.tensor([1_500_000, 1_999_999])])
    some, found = map(torch.cat, zip(*source._picked("g", "t", iter([ids])), strict=True))
    assert torch.equal(some, ids) and torch.equal(found[:, 0], ids)
    assert len(reads) == 6 and reads[-2:] == [(1_500_000, 1_500_001), (1_999_999, 2_000_000)]
    assert max(stop - start for start, stop in reads) * 32 <= 8 << 20


def test_search_vectors_are_a_delta_in_a_store_too(tmp_path: Path) -> None:
    """Those of the base are fetched for it, which whoever serves from the store does without."""
    pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")
    log, out = small_log(tmp_path / "log"), place("memory://snapshots/vectors")
    run = save_run(tmp_path / "run", log, "twin")
    exported(run, out, search="vectors")

    def change(weights: dict[str, Tensor]) -> None:
        weights["shared__item_id"][3] += 0.25

    save_run(run, log, "twin", step=2, change=change)
    manifest = load_snapshot(fetched(exported(run, out, search="vectors", since="1"), tmp_path)).manifest
    keys = {entry.feature: entry.changed for entry in manifest.search["main"].tables if entry.side == "key"}
    assert keys == {"item_id": 1, "category_id": 0}
    assert not list(tmp_path.rglob("search/*"))


def test_what_would_be_larger_than_a_whole_table_is_written_whole(runs: list[Path], tmp_path: Path) -> None:
    base = exported(runs[0], tmp_path / "out")

    def everything(weights: dict[str, Tensor]) -> None:
        weights["attention__item_id"].add_(1.0)

    run = save_run(
        tmp_path / "run", runs[0].parent / "log", "dare", "tables.item_id.rows=62", change=everything
    )
    tables = load_snapshot(exported(run, tmp_path / "out", since=str(base))).manifest.groups
    assert [t.changed for t in (*tables["attention"], *tables["representation"])] == [None, 0, 0, 0]
    other_type = load_snapshot(exported(run, tmp_path / "out", "fp16", "fp16", since="1")).manifest.groups
    assert [t.changed for t in (*other_type["attention"], *other_type["representation"])] == [None] * 4


@pytest.fixture(scope="module")
def chain(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    for i, since in enumerate(("", "1", "2")):
        exported(runs[i], root, since=since)
    return root


def remove_base(root: Path) -> None:
    shutil.rmtree(root / "v00000002")


def other_base(root: Path) -> None:
    shutil.rmtree(root / "v00000001")
    shutil.copytree(root / "v00000004", root / "v00000001")


def skip_one(root: Path) -> None:
    """The second delta in the place of the first."""
    shutil.rmtree(root / "v00000002")
    (root / "v00000003").rename(root / "v00000002")
    (root / "v00000002").rename(root / "v00000003")
    shutil.copytree(root / "v00000003", root / "v00000002")


def linked_base(root: Path) -> None:
    (root / "v00000001").rename(root / "elsewhere")
    (root / "v00000001").symlink_to(root / "elsewhere")


def damaged_base(root: Path) -> None:
    file = root / "v00000001" / "tables" / "attention.0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def damaged_delta(root: Path) -> None:
    file = root / "v00000002" / "tables" / "attention.0.ids.safetensors"
    content = bytearray(file.read_bytes())
    content[-8] ^= 1
    file.write_bytes(content)


BREAKS = [remove_base, other_base, skip_one, linked_base, damaged_base, damaged_delta]


@pytest.mark.parametrize("damage", BREAKS)
def test_broken_chains_are_refused(chain: Path, tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    root = tmp_path / "root"
    shutil.copytree(chain, root)
    publish_copy(root, root / "v00000001")
    assert load_snapshot(root / "v00000003").self_check() == 0
    damage(root)
    with pytest.raises(SnapshotError):
        load_snapshot(root / "v00000003")


def test_hostile_deltas_are_refused(chain: Path, tmp_path: Path) -> None:
    """Manifests by somebody who renews every digest, of rows that do not fit together."""
    from tests.trainer.snapshot.test_snapshot import change

    for edit in (
        lambda m: m["base"].update(number=3),
        lambda m: m["base"].update(number=7),
        lambda m: m.update(base=None),
        lambda m: m["groups"]["attention"][0].update(base_rows=61),
        lambda m: m["groups"]["attention"][0].update(changed=1),
        lambda m: m["groups"]["attention"][0].update(changed=None),
        lambda m: m["groups"]["attention"][0].update(changed=None, base_rows=None),
        lambda m: (
            [t.update(rows=2**40) for g in m["groups"].values() for t in g[:1]]
            + [m["features"].update(item_id=2**40)]
        ),
        lambda m: (
            [t.update(rows=8) for g in m["groups"].values() for t in g[:1]]
            + [m["features"].update(item_id=8)]
        ),
    ):
        root = tmp_path / f"root{len(list(tmp_path.iterdir()))}"
        shutil.copytree(chain, root)
        change(root / "v00000003", edit)
        with pytest.raises(SnapshotError):
            load_snapshot(root / "v00000003")


def test_what_to_build_on_must_be_there(runs: list[Path], chain: Path, tmp_path: Path) -> None:
    for since in ("9", "v00000009", "../v00000001", str(tmp_path), "latest"):
        with pytest.raises(SnapshotError, match="has no version"):
            exported(runs[0], chain, since=since)
    names = {path.name for path in chain.iterdir()}
    assert names == {"LATEST", "v00000001", "v00000002", "v00000003"}
    assert json.loads((chain / "v00000003" / "manifest.json").read_text())["base"]["number"] == 2


def test_rows_that_a_chain_of_checkpoints_knows_give_the_same_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a training with incremental checkpoints: no table is read, the bytes are those of comparing all."""
    log = small_log(tmp_path / "log")
    config = preset("dare", log, "tables.item_id.rows=4000")
    RunFolder(tmp_path / "made").write_config(config)
    words = ["train", "--config", str(tmp_path / "made" / "config.toml"), "--out", str(tmp_path / "run")]
    more = ["checkpoint.full_every=9", "checkpoint.every_steps=1", "checkpoint.keep=9", "train.max_steps=3"]
    done = tandemrec(*words, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    read: list[str] = []
    bands = TensorReader.bands
    monkeypatch.setattr(
        TensorReader, "bands", lambda self, *given: (read.append(given[0]), bands(self, *given))[1]
    )
    versions = []
    for known in (True, False):
        out = tmp_path / f"out{known}"
        exported(tmp_path / "run", out, which="1")
        read.clear()
        if not known:
            monkeypatch.setattr("pipelines.export_version._base_step", lambda *given: None)
        versions.append(exported(tmp_path / "run", out, which="3", since="1", parity_requests=9))
        # A table of nine rows is written whole, since most have changed.
        assert known == (not [name for name in read if "item_id" in name])
    one, other = ({p.relative_to(v): p.read_bytes() for p in v.rglob("*.safetensors")} for v in versions)
    assert one == other
    held = load_snapshot(versions[0]).manifest.groups["attention"][0]
    assert held.rows == 4000 and 0 < held.held < 100
    # A checkpoint of that step by somebody else is no base of this run's.
    run: Any = SimpleNamespace(checkpoint=tmp_path / "run" / "checkpoints" / "step-00000003")
    base = read_chain(versions[0]).versions[1]
    for digest, step in ((base[1].checkpoint, 1), ("0" * 64, None), ("", None)):
        manifest = base[1].model_copy(update={"checkpoint": digest})
        assert _base_step(run, Chain(((base[0], manifest),))) == step
