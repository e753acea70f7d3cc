"""Checkpoints: whole or not at all, refused when anything changed, and never unpickled unverified."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from embeddings.errors import CheckpointError
from trainer import checkpoint
from trainer.distributed import process_group
from trainer.durable import file_digest


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group():
        yield


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((50, 4), value), "b": torch.arange(10.0) + value}


def save(folder: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(folder, step, tensors(float(step)), {"step": step}, keep)


def test_round_trip_and_newest(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none") == (None, [])
    save(tmp_path, 1)
    last = save(tmp_path, 12)
    assert checkpoint.newest(tmp_path) == (last, [])
    found = tensors(0.0)
    checkpoint.load_tensors(last, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(12.0).items())
    assert checkpoint.read_state(last) == {"step": 12}
    assert not list(tmp_path.glob("*.tmp-*"))


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_random_bit_flips_are_all_refused_and_named(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    files = sorted(p for p in newer.rglob("*") if p.is_file() and p.name != "manifest.json")
    rng = np.random.default_rng(0)
    for _ in range(200):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        path, refused = checkpoint.newest(tmp_path)
        assert path == older and len(refused) == 1 and str(file) in refused[0]
        file.write_bytes(content)
    assert checkpoint.newest(tmp_path) == (newer, [])


@pytest.mark.parametrize("harm", ["truncate", "remove", "extra", "swap", "no manifest", "manifest is text"])
def test_other_damage_is_refused(tmp_path: Path, harm: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    shard = next(newer.glob("*.distcp"))
    actions = {
        "truncate": lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        "remove": shard.unlink,
        "extra": lambda: (newer / "more").write_text("x"),
        "swap": lambda: shutil.copy(older / shard.name, shard),
        "no manifest": (newer / "manifest.json").unlink,
        "manifest is text": lambda: (newer / "manifest.json").write_text("[]"),
    }
    actions[harm]()
    path, refused = checkpoint.newest(tmp_path)
    assert path == older and len(refused) == 1


def test_nothing_is_unpickled_before_its_digest_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    (newer / ".metadata").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    monkeypatch.chdir(tmp_path)
    path, _ = checkpoint.newest(tmp_path)
    assert path != newer and not (tmp_path / "pwned").exists()


def test_a_damaged_checkpoint_is_written_again_and_kept_aside(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    next(path.glob("*.distcp")).unlink()
    assert save(tmp_path, 5) == path
    checkpoint.verify(path)
    assert len(list(tmp_path.glob("step-00000005.refused-*"))) == 1
    before = (path / "manifest.json").stat().st_mtime_ns
    save(tmp_path, 5)
    assert (path / "manifest.json").stat().st_mtime_ns == before


def test_a_failed_save_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("_publish", "_prepare"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(
                CheckpointError, match=r"step-00000002: rank 0 could not save: .*No space left"
            ):
                save(tmp_path, 2)
        assert checkpoint.newest(tmp_path) == (older, [])
    assert save(tmp_path, 2).exists() and not list(tmp_path.glob("*.tmp-*"))


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        checkpoint.load_tensors(path, {"a": torch.zeros(60, 4)})
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        checkpoint.load_tensors(path, {"c": torch.zeros(1)})


def test_manifest_lists_every_file_with_its_digest(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in path.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        assert entry["sha256"] == file_digest(path / name)
