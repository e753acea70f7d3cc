"""Snapshots of models whose ids come and go: scores are the trainer's, deltas carry births and deaths."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embeddings.errors import DataError, SnapshotError
from embeddings.ids.stage import IdStage
from pipelines.export import report_lines
from pipelines.export_version import ExportOptions, Published, publish_version
from pipelines.score import score
from tests.helpers.launching import ROOT
from tests.helpers.living import raw_id, raw_log, see, stage_of
from tests.helpers.logs import small_log
from tests.helpers.models import preset
from tests.helpers.snapshots import exported, save_run
from tests.trainer.snapshot.test_delta import tables
from tests.trainer.snapshot.test_snapshot import change as change_manifest
from trainer.ranks.process_group import process_group
from trainer.snapshot import load_snapshot
from trainer.snapshot.reading import read_manifest

IDS = ("ids.item_id.capacity=40", "ids.item_id.shared_rows=4")
APART = ("ids.item_id.groups.attention=12",)


def trained(run: Path, log: Path, steps: int, *more: str) -> IdStage:
    """A checkpoint of a stage that has seen ever later items, whose rows have changed."""
    config = preset("dare", log, *IDS, *more)
    stage = stage_of(config)
    rows: set[int] = set()
    for step in range(steps):
        before = dict(zip(*map(np.ndarray.tolist, stage.maps["item_id"].entries()), strict=True))
        see(stage, range(10 * step, 10 * step + 30), 1000 * step)
        after = dict(zip(*map(np.ndarray.tolist, stage.maps["item_id"].entries()), strict=True))
        rows |= {row for item, row in after.items() if step and before.get(item) != row}

    def change(weights: dict[str, Tensor]) -> None:
        for name in ("attention__item_id", "representation__item_id"):
            weights[name][[row for row in rows if row < len(weights[name])]] += 0.25

    save_run(run, log, "dare", *IDS, *more, step=steps, change=change, ids=stage)
    return stage


def published(run: Path, out: Path, since: str = "") -> Published:
    with process_group(device="cpu") as ranks:
        return publish_version(run, out, ranks, ExportOptions("fp32", "fp32", since, parity_requests=9))


@pytest.mark.parametrize("more", [(), APART])
def test_base_and_deltas_equal_a_full_export(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Maps and tables bit for bit; scores are the trainer's, and so are those of a log with raw ids."""
    log, run = raw_log(tmp_path / "log"), tmp_path / "run"
    deltas, maps = [], []
    for steps in (1, 2, 4):
        stage = trained(run, log, steps, *more)
        maps.append(stage.maps["item_id"].entries())
        deltas.append(published(run, tmp_path / "deltas", since=deltas[-1].path.name if deltas else ""))
        full = published(run, tmp_path / f"full{steps}")
        assert deltas[-1].parity.worst == full.parity.worst == 0 and full.parity.requests == 9
        found, wanted = (load_snapshot(each.path) for each in (deltas[-1], full))
        assert found.id_maps.keys() == set(stage.maps) and found.self_check() == 0
        for name, own in stage.maps.items():
            for snapshot in (found, wanted):
                whole = snapshot.id_maps[name].whole()
                assert np.array_equal(whole.ids, own.entries()[0])
                assert np.array_equal(whole.rows, own.entries()[1])
        for name, tensor in tables(full.path).items():
            assert torch.equal(tables(deltas[-1].path)[name], tensor), name
    for before, after, version in zip(maps, maps[1:], deltas[1:], strict=False):
        gone = len(set(before[0].tolist()) - set(after[0].tolist()))
        entry = version.manifest.ids["item_id"]
        assert (entry.gone, entry.base_live, entry.live) == (gone, before[0].size, after[0].size)
        assert version.manifest.tombstones == gone
        assert f"{entry.set:,} new or moved, {gone:,} gone" in "\n".join(report_lines(version))
    assert deltas[-1].manifest.tombstones > 0
    file = score(tmp_path / "deltas", log, "validation", 0, tmp_path / "scores.parquet")
    assert file.is_file()


def test_recorded_requests_keep_their_ids(tmp_path: Path) -> None:
    log, run = raw_log(tmp_path / "log"), tmp_path / "run"
    trained(run, log, 2)
    snapshot = load_snapshot(published(run, tmp_path / "out").path)
    ids = set(snapshot.recorded.batch.features["item_id"].values().tolist())
    assert ids <= {raw_id(item) for item in range(60)} and min(ids) < -(1 << 60)
    rows = snapshot.with_rows(snapshot.recorded.batch).features["item_id"].values()
    assert 0 <= int(rows.min()) < 4 < int(rows.max()) < snapshot.manifest.features["item_id"]


def test_other_ids_than_those_of_training_are_refused(tmp_path: Path) -> None:
    """A dense log for a model of raw ids."""
    log, run = raw_log(tmp_path / "log"), tmp_path / "run"
    trained(run, log, 1)
    version = published(run, tmp_path / "out").path
    dense = small_log(tmp_path / "dense")
    with pytest.raises(DataError, match=r"'item_id' are dense, and those .* are raw"):
        score(version, dense, "test", 0, tmp_path / "scores.parquet")


def test_a_manifest_says_nothing_of_maps_where_there_are_none(tmp_path: Path) -> None:
    version = exported(save_run(tmp_path / "run", small_log(tmp_path / "log")), tmp_path / "out")
    assert "ids" not in json.loads((version / "manifest.json").read_text())
    assert read_manifest(version).tombstones == 0


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("living")
    log = raw_log(root / "log")
    for steps, since in ((2, ""), (3, "1")):
        trained(root / "run", log, steps)
        published(root / "run", root / "out", since)
    return root / "out"


def test_a_reader_of_tombstones_follows_version_by_version(chain: Path) -> None:
    """The code on the page, applied to a store of ids."""
    page = (ROOT / "docs" / "snapshots.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(next(code for code in re.findall(r"```python\n(.*?)```", page, re.S) if "gone" in code), names)
    store: dict[int, int] = {}
    for number in (1, 2):
        gone, there = names["changes"](chain / f"v{number:08d}", "item_id")
        assert (len(gone) > 0) == (number == 2)
        for item in gone:
            del store[item]
        store |= there
        whole = load_snapshot(chain / f"v{number:08d}").id_maps["item_id"].whole()
        assert store == dict(zip(whole.ids.tolist(), whole.rows.tolist(), strict=True))


def test_a_chain_that_lost_a_map_is_refused(chain: Path, tmp_path: Path) -> None:
    for number, damage in enumerate(("remove", "flip")):
        root = tmp_path / str(number)
        shutil.copytree(chain, root)
        file = root / "v00000001" / "ids" / "0.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.unlink()
        if damage == "flip":
            file.write_bytes(content)
        with pytest.raises(SnapshotError, match=r"ids/0\.safetensors: "):
            load_snapshot(root)


def test_manifests_whose_maps_do_not_fit_are_refused(chain: Path, tmp_path: Path) -> None:
    """By somebody who renews every digest."""
    for number, edit in enumerate(
        (
            lambda m: m.pop("ids"),
            lambda m: m["ids"].update(category_id=m["ids"]["item_id"]),
            lambda m: m["ids"]["item_id"].update(capacity=39),
            lambda m: m["ids"]["item_id"].update(shared_rows=5),
            lambda m: m["ids"]["item_id"].update(base_live=None, set=None, gone=None),
            lambda m: m["ids"]["item_id"].update(base_live=31),
            lambda m: m["config"]["ids"]["item_id"].update(capacity=39),
            lambda m: m["config"]["ids"]["item_id"].update(shared_rows=5),
            lambda m: m["config"].update(ids={}),
            lambda m: m["features"].update(item_id=60),
            lambda m: m["groups"]["attention"][0].update(rows=60, base_rows=60),
            lambda m: m.update(base=None),
        )
    ):
        root = tmp_path / str(number)
        shutil.copytree(chain, root)
        change_manifest(root / "v00000002", edit)
        with pytest.raises(SnapshotError):
            load_snapshot(root / "v00000002")
