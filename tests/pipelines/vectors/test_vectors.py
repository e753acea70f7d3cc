"""Vectors written for retrieval: an inner product of them is the model's own score."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.errors import ConfigError, DataError
from pipelines.score import open_requests
from pipelines.vectors import vectors
from pipelines.vectors.options import VectorOptions, groups_of
from tests.helpers.living import RAW, raw_rows, see, stage_of
from tests.helpers.logs import Row, Shape, enrich, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.snapshots import exported, save_run
from trainer.data.batch import RequestBatch
from trainer.log.encoders.buckets import Buckets
from trainer.log.schema import FeatureInfo
from trainer.model.branch import Branch
from trainer.snapshot import Snapshot, load_snapshot
from trainer.snapshot.retrieval.vector_files import VectorsManifest, read_vectors_manifest

TAGS = {"tags": FeatureInfo(rows=20, multi=True), "band": FeatureInfo(rows=5, side="candidate")}


def consistent(rows: list[Row]) -> list[Row]:
    """The same rows, with features that follow from the item."""
    for row in rows:
        row["history_category_id"] = [item % 9 for item in row["history_item_id"]]
        row["candidate_category_id"] = [[i % 9 for i in items] for items in row["candidate_item_id"]]
        row["history_tags"] = [list(range(item % 3)) for item in row["history_item_id"]]
        row["candidate_tags"] = [[list(range(i % 3)) for i in items] for items in row["candidate_item_id"]]
        row["candidate_band"] = [[i % 5 for i in items] for items in row["candidate_item_id"]]
    return rows


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log whose items have one category, some tags and, as candidates, a band."""
    rows = consistent(random_rows(5, Shape(users=24, behaviors=30)))
    folder = tmp_path_factory.mktemp("log") / "log"
    return write_log(folder, {"train": rows, "test": rows[:12]}, more=TAGS)


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each snapshot is loaded once in this file."""
    monkeypatch.setattr(vectors, "load_fetched", _load)


@lru_cache
def _load(path: Path, cache: Path | None) -> Snapshot:
    return load_snapshot(path)


def made(root: Path, log: Path, name: str, *overrides: str) -> Path:
    save_run(root / name, log, name, *overrides)
    return exported(root / name, root / f"{name}-snapshot").parent


@pytest.fixture(scope="module")
def towers(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of `td_sasrec`, with the towers of the loss `retrieval` beside."""
    return made(tmp_path_factory.mktemp("towers"), log, "td_sasrec", 'model.auxiliary="retrieval"')


@pytest.fixture(scope="module")
def twin(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("twin"), log, "twin")


def batches(snapshot: Snapshot, log: Path) -> Iterator[RequestBatch]:
    """The requests of the test split, with rows of tables in the place of ids."""
    reader, _ = open_requests(snapshot, log, "test")
    for step in reader.steps():
        yield snapshot.with_rows(step.batch)


def rows_of(folder: Path) -> tuple[list[Row], np.ndarray]:  # type: ignore[type-arg]
    table = pq.read_table(folder / "vectors.parquet")
    vectors = np.array(table.column("vector").to_pylist(), dtype=np.float32)
    return table.drop_columns(["vector"]).to_pylist(), vectors


def written(snapshot: Path, log: Path, out: Path, **options: object) -> VectorsManifest:
    return vectors.write_vectors(snapshot, log, out, VectorOptions(**options))  # type: ignore[arg-type]


def test_every_item_of_the_log_is_there_with_its_features(twin: Path, log: Path, tmp_path: Path) -> None:
    manifest = written(twin, log, tmp_path / "out", space="representation")
    rows, found_vectors = rows_of(tmp_path / "out")
    seen = {}
    for split in ("train", "test"):
        for file in sorted((log / split).glob("*.parquet")):
            for row in pq.read_table(file).to_pylist():
                given = [*row["history_item_id"], *(i for items in row["candidate_item_id"] for i in items)]
                for item in given:
                    seen[item] = seen.get(item, 0) + 1
    unknown = seen.pop(0)
    assert {row["item"]: row["occurrences"] for row in rows} == seen
    assert [row["item"] for row in rows] == sorted(seen)
    assert all(row["feature_category_id"] == row["item"] % 9 for row in rows)
    assert all(row["feature_tags"] == list(range(row["item"] % 3)) for row in rows)
    assert manifest.counts["items"] == len(rows) == len(found_vectors) == manifest.rows
    assert (manifest.counts["conflicts"], manifest.counts["unknown_occurrences"]) == (0, unknown)
    assert manifest == read_vectors_manifest(tmp_path / "out", check=True)


@torch.no_grad()
def test_a_found_item_has_the_attention_score_of_the_model(twin: Path, log: Path, tmp_path: Path) -> None:
    """A candidate's query against the index of a head gives what stage two says of each of its behaviors."""
    manifest = written(twin, log, tmp_path / "out", space="attention", index="flat", queries=20)
    rows, _ = rows_of(tmp_path / "out")
    place = {row["item"]: n for n, row in enumerate(rows)}
    snapshot = load_snapshot(twin)
    batch = next(batches(snapshot, log))
    retrieval = snapshot.model.retrieve(batch)["main"]
    branch = snapshot.model.branches["main"]
    assert isinstance(branch, Branch) and branch.scorer is not None
    bare = branch.scorer.over_windows(retrieval.vectors, retrieval.windows)
    bias = branch.scorer.window_bias(retrieval.vectors, retrieval.windows)
    assert bias is not None
    bare = bare - bias[retrieval.windows.of_candidate][:, None]
    items = batch.features["item_id"].values()[: batch.behaviors]
    assert manifest.heads == 4 and manifest.index is not None and len(manifest.index.files) == 4
    checked = 0
    for head, name in enumerate(manifest.index.files):
        index = faiss.read_index(str(tmp_path / "out" / name))
        width = index.d
        queries = retrieval.vectors.query_CD[:, head * width : (head + 1) * width].numpy()
        products, found = index.search(np.ascontiguousarray(queries), len(rows))
        for c in range(batch.candidates):
            window = retrieval.windows.of_candidate[c]
            of_row = dict(zip(found[c].tolist(), products[c].tolist(), strict=True))
            for x in torch.nonzero(retrieval.windows.mask[window]).flatten().tolist():
                item = int(items[retrieval.windows.index[window, x]])
                if item:
                    assert of_row[place[item]] == pytest.approx(float(bare[c, head, x]), abs=1e-5)
                    checked += 1
    assert checked > 100


@pytest.mark.parametrize("space", ["towers", "retrieval"])
@torch.no_grad()
def test_a_user_and_an_item_multiply_to_the_models_score(
    towers: Path, log: Path, tmp_path: Path, space: str
) -> None:
    written(towers, log, tmp_path / "items", space=space)
    written(towers, log, tmp_path / "users", space=space, of="users")
    items, item_vectors = rows_of(tmp_path / "items")
    users, user_vectors = rows_of(tmp_path / "users")
    place = {row["item"]: n for n, row in enumerate(items)}
    row_of = {(row["request_id"], row.get("group", 0)): n for n, row in enumerate(users)}
    snapshot = load_snapshot(towers)
    if space == "retrieval":
        snapshot.model.train()  # where alone the towers of the loss are asked
    checked = 0
    for batch in batches(snapshot, log):
        given = snapshot.model(batch)
        expected = given.logits[:, 0]
        if space == "retrieval":
            expected = 20.0 * (given.retrieved.user * given.retrieved.item).sum(1)
        candidates = batch.features["item_id"].values()[batch.behaviors :].tolist()
        for c, item in enumerate(candidates):
            group = item % 9 if space == "towers" else 0
            request = int(batch.request_id[batch.candidate_request[c]])
            if item and (request, group) in row_of:
                user = row_of[request, group]
                product = float(item_vectors[place[item]] @ user_vectors[user]) + users[user]["offset"]
                assert product == pytest.approx(float(expected[c]), abs=1e-5)
                checked += 1
    assert checked > 15


def test_users_are_their_last_requests(towers: Path, log: Path, tmp_path: Path) -> None:
    manifest = written(towers, log, tmp_path / "out", space="towers", of="users", groups=(3, 7))
    rows, _ = rows_of(tmp_path / "out")
    expected = []
    for file in sorted((log / "test").glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            last = row["request_id"][-1] if "request_id" in row else row["request_request_id"][-1]
            expected += [(row["user_id"], last, group) for group in (3, 7)]
    assert [(row["user_id"], row["request_id"], row["group"]) for row in rows] == expected
    assert manifest.counts == {"users": len(expected) // 2} and manifest.width == 33


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_an_index_over_groups_finds_what_brute_force_finds(
    towers: Path, log: Path, tmp_path: Path, kind: str
) -> None:
    """Rows of a group lie together, and a user's vector is compared with those of its group alone."""
    manifest = written(towers, log, tmp_path / "out", space="towers", index=kind, recall=1.0)
    assert manifest.index is not None and manifest.index.recall[-1].recall == 1.0
    rows, found_vectors = rows_of(tmp_path / "out")
    groups = pq.read_table(tmp_path / "out" / "groups.parquet").to_pylist()
    index = faiss.read_index(str(tmp_path / "out" / manifest.index.files[0]))
    assert index.ntotal == len(rows) == sum(each["rows"] for each in groups)
    for each in groups:
        own = slice(each["first"], each["first"] + each["rows"])
        assert {row["feature_category_id"] for row in rows[own]} == {each["group"]}
    query = np.ascontiguousarray(-found_vectors[:3])
    products, found = index.search(query, 1)
    assert products[:, 0] == pytest.approx((query @ found_vectors.T).max(1), abs=1e-5)
    assert products[:, 0] == pytest.approx((query * found_vectors[found[:, 0]]).sum(1), abs=1e-5)


def test_items_that_contradict_themselves_are_counted(tmp_path: Path) -> None:
    """The newest row wins; a feature of candidates is taken from candidates, and may be missing."""
    rows = enrich(random_rows(8, Shape(users=10)), 8)
    log = write_log(tmp_path / "log", {"train": rows}, more=TAGS)
    snapshot = made(tmp_path, log, "dare")
    manifest = written(snapshot, log, tmp_path / "out")
    found, _ = rows_of(tmp_path / "out")
    newest: dict[int, tuple[bool, int, int]] = {}
    values: dict[int, set[int]] = {}
    as_candidates = set()
    for row in rows:
        events = list(
            zip(row["history_item_id"], row["history_category_id"], row["history_timestamp"], strict=True)
        )
        sides = [(False, *event) for event in events]
        for items, categories, time in zip(
            row["candidate_item_id"], row["candidate_category_id"], row["request_timestamp"], strict=True
        ):
            sides += [(True, i, c, time) for i, c in zip(items, categories, strict=True)]
        for candidate, item, category, time in sides:
            if item:
                newest[item] = max(newest.get(item, (False, -1, -1)), (candidate, time, category))
                values.setdefault(item, set()).add(category)
                as_candidates |= {item} if candidate else set()
    got = {row["item"]: row["feature_category_id"] for row in found}
    times: dict[int, tuple[bool, int, int]] = newest
    assert got.keys() == times.keys()
    assert all(got[item] in values[item] for item in got)
    assert manifest.counts["conflicts"] >= sum(len(each) > 1 for each in values.values())
    assert manifest.counts["never_candidates"] == len(got.keys() - as_candidates)
    assert {row["item"] for row in found if row["feature_band"] is None} == got.keys() - as_candidates


def test_items_with_raw_ids_and_numbers_have_the_keys_of_their_behaviors(tmp_path: Path) -> None:
    """Ids that come and go, some of them without a row, and a number that an encoder makes ids of."""
    rows = consistent(raw_rows(4, Shape(users=8, behaviors=30)))
    for row in rows:
        row["history_price"] = [item % 7 for item in row["history_item_id"]]
        row["candidate_price"] = [[i % 7 for i in items] for items in row["candidate_item_id"]]
    price = FeatureInfo(rows=1, encoder=Buckets(kind="buckets", edges=(2, 5)))
    log = write_log(tmp_path / "log", {"train": rows, "test": rows[:4]}, more={**TAGS, **RAW, "price": price})
    ids = ("ids.item_id.capacity=40", "ids.item_id.shared_rows=4")
    stage = stage_of(preset("dare", log, *ids))
    see(stage, range(25), 1000)
    save_run(tmp_path / "run", log, "dare", *ids, ids=stage)
    root = exported(tmp_path / "run", tmp_path / "snapshot").parent
    written(root, log, tmp_path / "out")
    found, found_vectors = rows_of(tmp_path / "out")
    place = {row["item"]: n for n, row in enumerate(found)}
    assert len(place) > 30 and all(row["feature_price"] == row["item"] % 7 for row in found)
    snapshot = load_snapshot(root)
    reader, _ = open_requests(snapshot, log, "test")
    for step in reader.steps():
        with torch.no_grad():
            keys = snapshot.model.retrieve(snapshot.with_rows(step.batch))["main"].vectors.key_ND
        items = step.batch.features["item_id"].values()[: step.batch.behaviors].tolist()
        assert torch.from_numpy(found_vectors)[[place[item] for item in items]].equal(keys[: len(items)])


def test_what_a_model_has_not_is_refused_with_the_reason(
    twin: Path, towers: Path, log: Path, tmp_path: Path
) -> None:
    for snapshot, options, message in (
        (twin, {"of": "users"}, "depends on the candidate"),
        (twin, {"of": "users", "space": "representation"}, "weights that depend on the candidate"),
        (twin, {"space": "towers"}, "needs a candidate before it knows anything of a user"),
        (twin, {"space": "retrieval"}, 'without auxiliary = "retrieval"'),
        (twin, {"branch": "other"}, "--branch other: the model has main, recent"),
        (twin, {"space": "attenton"}, "did you mean 'attention'"),
        (twin, {"item": "tags"}, "--item tags: no feature of candidates.*it has item_id, category_id"),
        (towers, {"space": "attention"}, 'sequence = "sasrec" weighs no behaviors'),
        (towers, {"space": "towers", "task": "buy"}, "--task buy: the model has click"),
        (towers, {"space": "towers", "of": "users", "index": "flat"}, "an index is over items"),
        (towers, {"space": "towers", "of": "users", "groups": (99,)}, "ids of category_id are 0 to 8"),
        (towers, {"space": "towers", "of": "users", "split": "validation"}, "--split validation"),
        (towers, {"space": "towers", "groups": (1,)}, "--groups: only users"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            written(snapshot, log, tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="--groups x: must be ids"):
        groups_of("1,x")


def test_other_folders_are_never_replaced(twin: Path, log: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for overwrite, message in ((False, "is there already"), (True, "unreadable")):
        with pytest.raises(DataError, match=message):
            written(twin, log, tmp_path / "mine", space="representation", overwrite=overwrite)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    first = written(twin, log, tmp_path / "out", space="representation")
    assert written(twin, log, tmp_path / "out", space="representation", overwrite=True) == first
    damaged = tmp_path / "out" / "vectors.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="does not match the manifest"):
        read_vectors_manifest(tmp_path / "out", check=True)
