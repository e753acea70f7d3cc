"""Snapshots: they score like the trainer, are published whole, and nothing changed gets through."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from embeddings.errors import SnapshotError
from tests.helpers.launching import tandemrec, train
from tests.helpers.logs import FEATURES, small_log
from trainer.data.reader import SequenceLogReader
from trainer.snapshot import load_snapshot, resolve
from trainer.snapshot.loading import _line

EXACT = ["--dtype", "fp32", "--attention-dtype", "fp32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, a run trained on two ranks, its test scores, and a snapshot of it."""
    folder = tmp_path_factory.mktemp("snapshot")
    small_log(folder / "log", seed=4, users=30)
    train(folder / "log", folder / "run", ranks=2, train__max_steps=8, groups__attention__fusion="sum")
    for words in (
        ["evaluate", "--run", str(folder / "run"), "--split", "test"],
        ["export", "--run", str(folder / "run"), "--out", str(folder / "snapshot"), *EXACT],
    ):
        done = tandemrec(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def score(made: Path, snapshot: Path, *words: str):  # type: ignore[no-untyped-def]
    out = made / "scores.parquet"
    return tandemrec(
        "score", "--snapshot", str(snapshot), "--requests", str(made / "log"), "--out", str(out), *words
    )


def test_a_fresh_process_scores_like_the_trainer(made: Path) -> None:
    done = score(made, made / "snapshot", "--against", str(made / "run" / "scores-test.parquet"))
    assert done.returncode == 0, done.stderr
    assert "largest difference to the trainer's own scores: 0 (100.00% bit-equal" in done.stdout
    found, own = (pq.read_table(made / name) for name in ("scores.parquet", "run/scores-test.parquet"))
    assert found.equals(own) and found.num_rows > 50


def test_limit_counts_requests(made: Path) -> None:
    done = score(
        made, made / "snapshot", "--limit", "7", "--against", str(made / "run" / "scores-test.parquet")
    )
    assert done.returncode == 0, done.stderr
    table = pq.read_table(made / "scores.parquet")
    assert len({(r["user_id"], r["request_id"]) for r in table.to_pylist()}) == 7


def test_other_scores_are_an_error(made: Path) -> None:
    table = pq.read_table(made / "run" / "scores-test.parquet")
    scores = table.column("score_click").to_numpy() + np.float32(0.01)
    moved = table.set_column(table.schema.get_field_index("score_click"), "score_click", pa.array(scores))
    pq.write_table(moved, made / "other.parquet")
    done = score(made, made / "snapshot", "--against", str(made / "other.parquet"))
    assert done.returncode == 2 and "scores differ by 0.01" in done.stderr


def test_a_snapshot_is_json_and_safetensors_only(made: Path) -> None:
    names = sorted(
        str(p.relative_to(made / "snapshot")) for p in (made / "snapshot").rglob("*") if p.is_file()
    )
    assert names == [
        "LATEST",
        "v00000001/dense.safetensors",
        "v00000001/manifest.json",
        "v00000001/manifest.sha256",
        "v00000001/recorded.safetensors",
        "v00000001/tables/attention.0.safetensors",
        "v00000001/tables/attention.1.safetensors",
        "v00000001/tables/representation.0.safetensors",
        "v00000001/tables/representation.1.safetensors",
    ]


def test_versions_grow_and_latest_moves(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "snapshot"
    shutil.copytree(made / "snapshot", root)
    assert resolve(root).name == "v00000001"
    done = tandemrec("export", "--run", str(made / "run"), "--out", str(root), *EXACT)
    assert done.returncode == 0, done.stderr
    assert resolve(root).name == "v00000002"
    assert load_snapshot(root / "v00000001").self_check() == 0.0


def test_scores_do_not_depend_on_how_requests_are_batched(made: Path) -> None:
    snapshot = load_snapshot(made / "snapshot")
    results = []
    for changes in ({"batch_candidates": 5, "requests_per_block": 1}, {"batch_candidates": 500}):
        data = snapshot.manifest.config.data.model_copy(update=changes)
        steps = SequenceLogReader(data, "test", dict(FEATURES)).steps()
        results.append(torch.cat([snapshot.score(step.batch) for step in steps]))
    assert torch.allclose(results[0], results[1], atol=1e-6)


def copy(made: Path, tmp_path: Path) -> Path:
    target = tmp_path / "v00000001"
    shutil.copytree(made / "snapshot" / "v00000001", target)
    return target


def test_flipped_bits_never_load(made: Path, tmp_path: Path) -> None:
    path = copy(made, tmp_path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    rng = np.random.default_rng(0)
    for _ in range(300):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(SnapshotError, match=str(path)):
            load_snapshot(path)
        file.write_bytes(content)
    assert load_snapshot(path).self_check() == 0.0


def change(path: Path, edit) -> None:  # type: ignore[no-untyped-def]
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    rewrite(path, json.dumps(manifest))


def rewrite(path: Path, manifest: str) -> None:
    """A manifest by somebody who also knows to renew its digest."""
    (path / "manifest.json").write_text(manifest)
    (path / "manifest.sha256").write_text(hashlib.sha256(manifest.encode()).hexdigest())


@pytest.mark.parametrize(
    "evil", ["../dense.safetensors", "/etc/passwd", "tables/../../x.safetensors", "a\\b.safetensors", "x.pkl"]
)
def test_paths_that_leave_the_snapshot_are_refused(made: Path, tmp_path: Path, evil: str) -> None:
    path = copy(made, tmp_path)
    change(path, lambda manifest: manifest["files"][0].update(path=evil))
    with pytest.raises(SnapshotError, match=r"files\.0\.path"):
        load_snapshot(path)


def test_other_damage_is_refused(made: Path, tmp_path: Path) -> None:
    path = copy(made, tmp_path)
    manifest = (path / "manifest.json").read_text()
    dense = (path / "dense.safetensors").read_bytes()
    for name, text in {
        "twice": manifest.replace('"step":', '"step": 1, "step":', 1),
        "NaN": manifest.replace('"score_bound": 1e-6', '"score_bound": NaN', 1),
        "unknown key": manifest.replace("{", '{"code": "x",', 1),
        "another format": manifest.replace("tandemrec.snapshot", "other", 1),
        "deep": "[" * 100_000,
        "empty": "",
    }.items():
        assert text != manifest, name
        rewrite(path, text)
        with pytest.raises(SnapshotError):
            load_snapshot(path)
    rewrite(path, manifest)
    (path / "dense.safetensors").unlink()
    (tmp_path / "elsewhere").write_bytes(dense)
    (path / "dense.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SnapshotError, match="not a plain file"):
        load_snapshot(path)


HOSTILE = {
    "k": lambda m: m["config"]["model"].update(k=10**6),
    "history": lambda m: m["config"]["data"].update(history_length=4 * 10**8),
    "hidden": lambda m: m["config"]["model"].update(hidden=[60_000, 60_000]),
    "bound": lambda m: m.update(score_bound=1e308),
    "rows": lambda m: m["features"].update(item_id=10**9),
    "feature": lambda m: m["features"].pop("item_id"),
    "recorded": lambda m: m["recorded_features"].pop(),
    "group": lambda m: m["groups"].pop("attention"),
    "table": lambda m: m["groups"]["attention"].pop(),
    "dim": lambda m: m["groups"]["attention"][0].update(dim=8),
    "tasks": lambda m: m.update(tasks=["a", "b"]),
    "weights": lambda m: m["config"]["model"].update(weights="x"),
    "fusion": lambda m: m["config"]["groups"]["representation"].update(fusion="sum"),
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifests_end_in_a_snapshot_error(made: Path, tmp_path: Path, edit) -> None:  # type: ignore[no-untyped-def]
    path = copy(made, tmp_path)
    change(path, edit)
    with pytest.raises(SnapshotError):
        load_snapshot(path).self_check()


RECORDED = {
    "ids too large": lambda t: t["features.ids"].add_(1000),
    "ids negative": lambda t: t["features.ids"].sub_(1000),
    "counts": lambda t: t["features.counts"].neg_(),
    "window beyond": lambda t: t["window_end"].add_(2 * 10**6),
    "window before": lambda t: t["window_start"].sub_(5),
    "request": lambda t: t["candidate_request"].sub_(1),
    "order": lambda t: t["candidate_request"].copy_(t["candidate_request"].flip(0)),
    "scores": lambda t: t.update(scores=t["scores"][:3].clone()),
    "no scores": lambda t: t.pop("scores"),
    "wrong scores": lambda t: t["scores"].add_(0.01),
    "NaN scores": lambda t: t["scores"].fill_(float("nan")),
}


@pytest.mark.parametrize("edit", RECORDED.values(), ids=RECORDED.keys())
def test_hostile_recorded_requests_end_in_a_snapshot_error(made: Path, tmp_path: Path, edit) -> None:  # type: ignore[no-untyped-def]
    path = copy(made, tmp_path)
    file = path / "recorded.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    change(path, lambda manifest: renewed(manifest, file))
    with pytest.raises(SnapshotError):
        load_snapshot(path).self_check()


def test_what_does_not_fit_the_config_is_named(made: Path, tmp_path: Path) -> None:
    """All of torch's message in one line, and how many weights are not there."""
    path = copy(made, tmp_path)
    file = path / "dense.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[:2]
    save_file({name: tensor for name, tensor in tensors.items() if name not in lost}, file)
    change(path, lambda manifest: renewed(manifest, file))
    with pytest.raises(SnapshotError, match=f"does not fit the config: {lost[0]} and 1 more missing"):
        load_snapshot(path)
    error = RuntimeError('Error(s) in loading state_dict for Model:\n\tMissing key(s): "a.b".')
    assert _line(error) == 'Error(s) in loading state_dict for Model: Missing key(s): "a.b".'


def renewed(manifest: dict, file: Path) -> None:  # type: ignore[type-arg]
    for entry in manifest["files"]:
        if entry["path"] == file.name:
            entry.update(bytes=file.stat().st_size, sha256=hashlib.sha256(file.read_bytes()).hexdigest())


def test_missing_snapshots_are_named(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="no snapshot here"):
        load_snapshot(tmp_path)
    (tmp_path / "LATEST").write_text("../elsewhere\n")
    with pytest.raises(SnapshotError, match="which is no version"):
        load_snapshot(tmp_path)


def test_requests_of_another_vocabulary_are_not_scored(made: Path, tmp_path: Path) -> None:
    root = tmp_path / "snapshot"
    shutil.copytree(made / "snapshot", root)
    change(root / "v00000001", lambda manifest: manifest["vocabularies"].update(item_id="a" * 64))
    log = tmp_path / "log"
    shutil.copytree(made / "log", log)
    manifest = json.loads((log / "manifest.json").read_text())
    manifest["features"]["item_id"]["vocabulary"] = "b" * 64
    rewrite(log, json.dumps(manifest))
    words = [
        "score",
        "--snapshot",
        str(root),
        "--requests",
        str(log),
        "--out",
        str(tmp_path / "scores.parquet"),
    ]
    done = tandemrec(*words)
    assert done.returncode == 2 and "ids of 'item_id' are of another vocabulary" in done.stderr
    assert not (tmp_path / "scores.parquet").exists()
