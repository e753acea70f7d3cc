"""`tandemrec cluster` and the reader: what a request sees of a clustered log, and TWIN-V2 on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.errors import ConfigError, DataError
from pipelines.cluster import behavior_vectors, cluster, grouping_feature
from tests.helpers.launching import tandemrec, train
from tests.helpers.logs import Shape, random_rows, write_log
from trainer.config.sections import DataConfig
from trainer.data.batch import Sizes
from trainer.data.reader import SequenceLogReader
from trainer.data.rows import Columns, read_rows
from trainer.log.clusters import ClusterInfo, cluster_history
from trainer.log.schema import FeatureInfo, read_manifest
from trainer.model.windows import windows_of
from trainer.run_config import Config
from trainer.snapshot import load_snapshot

INFO = ClusterInfo(chunk=12, cap=4, group_by="category_id", seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A log, a snapshot trained on it, and the log with clusters."""
    root = tmp_path_factory.mktemp("clusters")
    rows = random_rows(6, Shape(users=20, behaviors=90))
    log = write_log(root / "log", {"train": rows, "validation": rows[:6]})
    train(log, root / "run", train__max_steps=3)
    done = tandemrec("export", "--run", str(root / "run"), "--out", str(root / "snapshot"))
    assert done.returncode == 0, done.stderr
    cluster(log, root / "snapshot", root / "clustered", INFO)
    return log, root / "snapshot", root / "clustered"


def test_a_request_sees_the_clusters_of_chunks_complete_before_it(made: tuple[Path, Path, Path]) -> None:
    """Against clustering its visible history alone; recent behaviors besides; blocks change nothing."""
    log, snapshot, clustered = made
    loaded = load_snapshot(snapshot)
    config = DataConfig(log=clustered, history_length=10_000, clusters=True, recent=5, batch_candidates=200)
    columns = Columns.of(read_manifest(log))
    expected = {}
    for file in sorted((log / "train").glob("*.parquet")):
        for group in range(pq.ParquetFile(file).metadata.num_row_groups):
            rows = read_rows(file, group, columns)
            vectors, ids = behavior_vectors(rows, loaded), rows.history["category_id"].values
            for user in range(rows.user_id.size):
                begin = rows.history_offsets[user]
                for r in range(rows.request_offsets[user], rows.request_offsets[user + 1]):
                    seen = slice(begin, begin + rows.history_end[r])
                    found = cluster_history(vectors[seen], ids[seen], rows.history_time[seen], INFO)
                    stands = np.nonzero(found.size)[0][::-1]
                    key = int(rows.user_id[user]), int(rows.request_id[r])
                    items = rows.history["item_id"].values[seen]
                    expected[key] = (
                        [(int(items[i]), int(found.size[i]), int(found.time[i])) for i in stands],
                        [int(i) for i in items[::-1][:5]],
                    )
    checked = 0
    for requests_per_block in (1, 4):
        per_block = config.model_copy(update={"requests_per_block": requests_per_block})
        for step in SequenceLogReader(per_block, "train", None).steps():
            batch = step.batch
            assert batch.clusters is not None
            assert batch.sizes == Sizes.of(batch) and batch.sizes.one_id
            windows, newest = windows_of(batch, 100, clusters=True), windows_of(batch, 100, 5)
            items = batch.features["item_id"].values()
            for r in range(batch.requests):
                index = windows.index[r][windows.mask[r]]
                assert windows.log_size is not None
                sizes, times = windows.log_size[r][windows.mask[r]].exp().round(), batch.clusters.time[index]
                found = list(zip(items[index].tolist(), sizes.int().tolist(), times.tolist(), strict=True))
                recent = items[newest.index[r][newest.mask[r]]].tolist()
                assert (found, recent) == expected[int(batch.user_id[r]), int(batch.request_id[r])]
                checked += bool(found)
    assert checked > 50


def test_twin_v2_trains_exports_and_scores_on_a_clustered_log(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, _, clustered = made
    overrides = {f"groups.shared.{key}": value for key, value in (("dim", 8), ("init_scale", 0.5))}
    small = {"data.log": clustered, "data.recent": 5, "model.k": 6, "model.branches.recent.k": 5, **overrides}
    words = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    words += ["--set", "train.max_steps=4", "--set", "data.batch_candidates=40"]
    run, snapshot = tmp_path / "run", tmp_path / "snapshot"
    for command in (
        ["train", "--config", "configs/twin_v2.toml", "--out", str(run), *words],
        ["evaluate", "--run", str(run), "--split", "validation"],
        ["export", "--run", str(run), "--out", str(snapshot)],
        ["score", "--snapshot", str(snapshot), "--requests", str(clustered), "--split", "validation",
         "--out", str(tmp_path / "scores.parquet"), "--against", str(run / "scores-validation.parquet")],
    ):  # fmt: skip
        done = tandemrec(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "bit-equal" in done.stdout


def test_clusters_must_be_there_and_fit(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    log, snapshot, _ = made
    with pytest.raises(ConfigError, match="are not clustered; make a log with `tandemrec cluster`"):
        SequenceLogReader(DataConfig(log=log, clusters=True), "train", None)
    with pytest.raises(
        DataError, match=r"no single-valued feature 'colour' of behaviors.*item_id, category_id"
    ):
        cluster(log, snapshot, tmp_path / "out", ClusterInfo(chunk=5, cap=2, group_by="colour"))
    assert not (tmp_path / "out").exists()
    for change, message in (
        ({"model": {"clusters": True}}, "model.clusters needs data.clusters"),
        ({"data": {"clusters": True}}, "leaves branch 'main' no single behaviors"),
    ):
        with pytest.raises(ValueError, match=message):
            Config.model_validate(change)


def test_histories_are_grouped_by_the_feature_of_the_fewest_values_unless_said_otherwise(
    made: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, snapshot, _ = made
    done = tandemrec(
        "cluster", "--log", str(log), "--snapshot", str(snapshot), "--out", str(tmp_path / "out")
    )
    assert done.returncode == 0 and "grouped by category_id -> " in done.stdout
    manifest = read_manifest(log)
    assert grouping_feature(manifest, "coarsest", log) == "category_id"
    assert grouping_feature(manifest, "none", log) == grouping_feature(manifest, "", log) == ""
    assert grouping_feature(manifest, "item_id", log) == "item_id"
    few = {**manifest.features, "action": FeatureInfo(rows=3, side="history")}
    unfit = {"listed": FeatureInfo(rows=2, multi=True), "hidden": FeatureInfo(rows=2, side="candidate")}
    assert (
        grouping_feature(manifest.model_copy(update={"features": {**few, **unfit}}), "coarsest", log)
        == "action"
    )
    items = {"item_id": manifest.features["item_id"]}
    assert grouping_feature(manifest.model_copy(update={"features": items}), "coarsest", log) == ""
    assert cluster(log, snapshot, tmp_path / "none", INFO.model_copy(update={"group_by": ""})).clusters
    assert "not grouped by any feature" in capsys.readouterr().out


def test_recent_behaviors_stay_beside_a_hard_search(made: tuple[Path, Path, Path]) -> None:
    """A recent branch sees the newest behaviors, whatever the search retrieved; retrieval is unchanged."""
    log, _, _ = made
    search = {"levels": ["category_id"], "budget": 3}
    plain = DataConfig.model_validate({"log": log, "search": search, "batch_candidates": 100})
    beside = plain.model_copy(update={"recent": 4})
    whole = DataConfig(log=log, batch_candidates=100)
    for a, b, full in zip(
        *(SequenceLogReader(each, "train", None).steps() for each in (plain, beside, whole)), strict=True
    ):
        without, batch = a.batch, b.batch
        assert without.retrieval is not None and batch.retrieval is not None
        for one, other in ((without, batch), (batch, without)):
            assert one.retrieval is not None and other.retrieval is not None
            assert one.sizes == Sizes.of(one)
            items, others = one.features["item_id"].values(), other.features["item_id"].values()
            mask = one.retrieval.index >= 0
            assert torch.equal(mask, other.retrieval.index >= 0)
            assert torch.equal(items[one.retrieval.index[mask]], others[other.retrieval.index[mask]])
        newest, expected = (windows_of(x, 500, 4) for x in (batch, full.batch))
        assert torch.equal(newest.mask, expected.mask)
        mine, theirs = batch.features["item_id"].values(), full.batch.features["item_id"].values()
        assert torch.equal(mine[newest.index[newest.mask]], theirs[expected.index[expected.mask]])
        assert torch.equal(newest.marks.age, expected.marks.age)
