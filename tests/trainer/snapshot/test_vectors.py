"""Pre-trained vectors in snapshots: scores and answers of the same bits without the files of training."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from embeddings.errors import DataError, SnapshotError
from pipelines.score import open_requests
from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.helpers.serving import bodies, model_body, reference
from tests.helpers.similarity import drawn_vectors, write_parquet
from tests.helpers.snapshots import exported, save_run
from trainer.data.reader import SequenceLogReader
from trainer.data.similarity.loading import load_vectors
from trainer.data.similarity.vectors import Vectors
from trainer.log.schema import read_manifest
from trainer.run_folder import RunFolder
from trainer.sealed_folder import MANIFEST
from trainer.serving.json_body import JsonForm
from trainer.serving.request import Limits, RequestError
from trainer.serving.scorer import Scorer
from trainer.snapshot import Snapshot, load_snapshot
from trainer.snapshot.manifest import SnapshotManifest
from trainer.snapshot.reading import _problem
from trainer.snapshot.vector_entries import SnapshotVectors, vectors_path
from trainer.snapshot.vectors import read_vectors, write_vectors

ROWS = enrich(random_rows(4, Shape(users=10)), 5)
SIMILARITIES = (
    ("near", "items", "statistic=top", "top=3"),
    ("tiers", "items", "statistic=histogram", "tiers=5"),
    ("town", "cities", "encoder=buckets"),
    ("taste", "users", "step=0.05"),
)


FEATURES = ("near_base_3", "tiers", "town", "taste_base_10")


def settings(folder: Path) -> list[str]:
    keys = {"items": "item_id", "cities": "city", "users": "user_id"}
    found = [f"data.vectors.{name}.file={folder / name}.parquet" for name in keys]
    found += [f"data.vectors.{name}.key={key}" for name, key in keys.items()]
    for name, to, *more in SIMILARITIES:
        found += [f"data.similarity.{name}.{each}" for each in ("of=items", f"to={to}", *more)]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with vectors beside it, and a run."""
    path = tmp_path_factory.mktemp("vectors")
    log = write_log(path / "log", {"train": ROWS}, rich=True)
    write_parquet(path / "items.parquet", drawn_vectors(1, range(5, 70)))
    write_parquet(path / "cities.parquet", drawn_vectors(2, range(1, 6)), "city")
    write_parquet(path / "users.parquet", drawn_vectors(3, range(8)), "user_id")
    save_run(path / "run", log, "dare", *settings(path))
    return path


@pytest.fixture(scope="module")
def snapshot(folder: Path) -> Iterator[Snapshot]:
    yield load_snapshot(exported(folder / "run", folder / "snapshot"))


def equal(left: Vectors, right: Vectors) -> bool:
    return np.array_equal(left.ids, right.ids) and np.array_equal(left.directions, right.directions)


def test_a_snapshot_scores_a_log_without_the_files(folder: Path, snapshot: Snapshot) -> None:
    data = RunFolder(folder / "run").read_config().data
    trained = load_vectors(data, read_manifest(data.log))
    assert {
        name: equal(each, trained[name].vectors) for name, each in snapshot.vectors.items()
    } == dict.fromkeys(("items", "cities", "users"), True)
    expected = [step.batch for step in SequenceLogReader(data, "train", snapshot.id_bounds()).steps()]
    for name in ("items", "cities", "users"):
        shutil.move(folder / f"{name}.parquet", folder / f"away-{name}")
    try:
        with pytest.raises(DataError, match="no such file"):
            SequenceLogReader(data, "train", snapshot.id_bounds())
        reader, _ = open_requests(snapshot, data.log, "train")
        for batch, step in zip(expected, reader.steps(), strict=True):
            assert step.batch.features.keys() == batch.features.keys()
            assert torch.equal(step.batch.features.values(), batch.features.values())
            assert torch.equal(step.batch.features.lengths(), batch.features.lengths())
    finally:
        for name in ("items", "cities", "users"):
            shutil.move(folder / f"away-{name}", folder / f"{name}.parquet")
    ids = torch.cat([batch.features["near_base_10"].values() for batch in expected])
    assert ids.unique().numel() > 8


def test_a_service_compares_as_training_did(folder: Path, snapshot: Snapshot) -> None:
    expected, serving = reference(snapshot), Scorer(snapshot)
    assert not {"near", "near_base_2", "tiers", "town"} & {*serving.needs.candidates.known}
    assert {"item_id"} <= {*serving.needs.candidates.needed} and "city" in serving.needs.context.needed
    named = [
        (name, JsonForm(model_body(body), serving.needs, None, "requests[0]").request({}, Limits()))
        for name, body in bodies(read_manifest(folder / "log"), ROWS)
    ]
    batch = serving.batch([request for _, request in named])
    train = SequenceLogReader(
        snapshot.manifest.config.data, "train", snapshot.id_bounds(), vectors=snapshot.vectors
    )
    by_request = {}
    for read in [batch, *(step.batch for step in train.steps())]:
        # Requests of a service are numbered.
        numbers = range(len(named)) if read is batch else read.request_id.tolist()
        names = [named[r][0][1] for r in numbers] if read is batch else [*numbers]
        for r, name in enumerate(names):
            rows = np.flatnonzero(read.candidate_request.numpy() == r) + read.behaviors
            found = [read.features[key].to_dense() for key in FEATURES]
            ids = [[part[row].tolist() for row in rows] for part in found]
            assert by_request.setdefault(name, ids) == ids
    assert len(by_request) == len(named) > 20
    answers, _ = serving.score([request for _, request in named])
    for (name, _), answer in zip(named, answers, strict=True):
        assert np.abs(answer.probabilities - expected[name]).max() <= 1e-6
    (_, body), *_ = bodies(read_manifest(folder / "log"), ROWS)
    del body["user_id"]
    with pytest.raises(RequestError, match="user_id: give the user's number, since this model compares"):
        JsonForm(model_body(body), serving.needs, None, "requests[0]").request({}, Limits())


def test_a_delta_has_vectors_that_are_others(folder: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    shutil.copytree(folder / "snapshot", tmp_path / "snapshot")
    write_parquet(tmp_path / "users.parquet", drawn_vectors(9, range(6)), "user_id")
    moved = f"data.vectors.users.file={tmp_path / 'users.parquet'}"
    run = save_run(tmp_path / "run", folder / "log", "dare", *settings(folder), moved)
    version = exported(run, tmp_path / "snapshot", since="1")
    assert [path.name for path in (version / "vectors").iterdir()] == ["users.safetensors"]
    found = load_snapshot(version)
    assert {name: each.of_base for name, each in found.manifest.vectors.items()} == {
        "items": True,
        "cities": True,
        "users": False,
    }
    assert equal(found.vectors["items"], snapshot.vectors["items"])
    assert found.vectors["users"].ids.tolist() == [1, 2, 3, 4, 5]
    (tmp_path / "snapshot" / "v00000001" / vectors_path("items")).unlink()
    with pytest.raises(SnapshotError, match="missing"):
        load_snapshot(version)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda ids, q: (ids[::-1].copy(), q), "names ids twice, or not in ascending order"),
        (lambda ids, q: (ids, 0 * q), "holds what is no direction"),
        (lambda ids, q: (ids, q * 9), "holds what is no direction"),
        (lambda ids, q: (ids, q[:, :2].copy()), "expected"),
        (lambda ids, q: (ids.astype(np.int32), q), "expected"),
    ],
)
def test_files_that_are_none(tmp_path: Path, snapshot: Snapshot, change: object, problem: str) -> None:
    given = snapshot.vectors["items"]
    described, _ = write_vectors(tmp_path, "items", given)
    assert described == SnapshotVectors(rows=given.ids.size, dim=6)
    assert equal(read_vectors(tmp_path, "items", described), given)
    path = tmp_path / vectors_path("items")
    held = load_file(path)
    ids, directions = change(held["ids"], held["directions"])  # type: ignore[operator]
    save_file({"ids": ids, "directions": directions}, path)
    with pytest.raises(SnapshotError, match=problem):
        read_vectors(tmp_path, "items", described)


def test_a_manifest_must_have_the_vectors_of_its_config(folder: Path, snapshot: Snapshot) -> None:
    manifest = snapshot.manifest
    assert (snapshot.path / MANIFEST).is_file() and not _problem(manifest)
    without = {name: each for name, each in manifest.vectors.items() if name != "users"}
    larger = manifest.vectors["users"].model_copy(update={"rows": 10**6})
    of_base = manifest.vectors["users"].model_copy(update={"of_base": True})
    for vectors, problem in (
        (without, "its vectors are not those of its config"),
        ({**without, "users": larger}, "has more rows than its file has room for"),
        ({**without, "users": of_base}, "its vectors users are those of a base, but there is none"),
    ):
        changed: SnapshotManifest = manifest.model_copy(update={"vectors": vectors})
        assert problem in _problem(changed)
