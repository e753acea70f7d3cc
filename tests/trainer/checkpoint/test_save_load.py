"""Checkpoints: whole or not at all, refused when anything changed, and never unpickled unverified."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embeddings.errors import CheckpointError
from tests.helpers.checkpoints import newest
from trainer.checkpoint import files
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.store_files import StoreFiles
from trainer.checkpoint.tensors import TensorReader
from trainer.ranks.process_group import process_group
from trainer.sealed_folder import file_digest
from trainer.storage import place


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with process_group():
        yield


HARM = ("truncate", "zero", "remove", "extra", "swap", "stale manifest", "no manifest", "manifest is text")


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((50, 4), value), "b": torch.arange(10.0) + value}


def save(folder: Path, step: int, keep: int = 9) -> Path:
    return checkpoint.save(folder, step, tensors(float(step)), {"step": step}, keep)


def test_round_trip_and_newest(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") == (None, [])
    save(tmp_path, 1)
    last = save(tmp_path, 12)
    assert newest(tmp_path) == (last, [])
    found = tensors(0.0)
    checkpoint.load_tensors(last, found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors(12.0).items())
    assert checkpoint.read_state(last) == {"step": 12}
    assert not list(tmp_path.glob("*.tmp-*"))


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_thousand_bit_flips_are_all_refused_and_named(tmp_path: Path) -> None:
    """Over all files, manifest included. DCP by itself loads nearly all of them in silence."""
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    contents = {file: file.read_bytes() for file in sorted(newer.rglob("*")) if file.is_file()}
    files = list(contents)
    assert {"manifest.json", "manifest.sha256", "state.json", ".metadata"} <= {file.name for file in files}
    rng = np.random.default_rng(0)
    # A tenth of them through the search for a checkpoint, which is slower.
    for number in range(1000):
        file = files[number % len(files)]
        flipped = bytearray(contents[file])
        flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError) as error:
            checkpoint.verify(newer)
        assert str(file) in str(error.value)
        if number % 10 == 0:
            found = checkpoint.find(tmp_path)
            assert found.path == older and len(found.refused) == 1 and str(file) in found.refused[0]
        file.write_bytes(contents[file])
    assert newest(tmp_path) == (newer, [])


@pytest.mark.parametrize("harm", HARM)
def test_other_damage_is_refused(tmp_path: Path, harm: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    shard = next(newer.glob("*.distcp"))
    actions = {
        "truncate": lambda: shard.write_bytes(shard.read_bytes()[:-1]),
        "zero": lambda: shard.write_bytes(bytes(shard.stat().st_size)),
        "remove": shard.unlink,
        "stale manifest": lambda: [
            shutil.copy(older / n, newer / n) for n in ("manifest.json", "manifest.sha256")
        ],
        "extra": lambda: (newer / "more").write_text("x"),
        "swap": lambda: shutil.copy(older / shard.name, shard),
        "no manifest": (newer / "manifest.json").unlink,
        "manifest is text": lambda: (newer / "manifest.json").write_text("[]"),
    }
    actions[harm]()
    path, refused = newest(tmp_path)
    assert path == older and len(refused) == 1
    found = checkpoint.find(tmp_path)
    assert (found.path, found.state, len(found.refused)) == (older, {"step": 1}, 1)


def test_nothing_is_unpickled_before_its_digest_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    newer = save(tmp_path, 2)
    (newer / ".metadata").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    monkeypatch.chdir(tmp_path)
    path, _ = newest(tmp_path)
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


def test_a_full_disk_leaves_the_older_ones_and_nothing_else(tmp_path: Path) -> None:
    """The limit on a file's size stands for the full disk: the same write fails, in the middle of a shard."""
    older = save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"a": torch.ones(1 << 20)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(CheckpointError) as error:
            checkpoint.save(tmp_path, 2, large, {"step": 2}, 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(error.value)
    assert str(tmp_path / "step-00000002") in message and "File too large" in message
    assert "4.2 MB" in message and "free" in message
    assert newest(tmp_path) == (older, [])
    assert [p.name for p in tmp_path.iterdir()] == [older.name]
    assert save(tmp_path, 2).exists()


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(tmp_path, 1)

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    # Permissions would not stop root, who runs these tests in containers.
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/step-00000002: .*Read-only file system"):
            save(tmp_path, 2)
    assert newest(tmp_path) == (older, [])


def test_a_power_cut_finds_nothing_unsynced_behind_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything reaches the disk in order: files whole, their directory, the rename, its directory."""
    synced: dict[str, int] = {}
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced[path] = os.fstat(descriptor).st_size
        events.append(f"sync {Path(path).name}")
        fsync(descriptor)

    def recording_rename(self: Path, target: Path) -> Path:
        if self.name.startswith("step-"):
            lost = [p.name for p in self.iterdir() if synced.get(str(p)) != p.stat().st_size]
            # DCP renames its metadata after it has synced them.
            assert (
                lost == [".metadata"]
                and synced[f"{self}/.metadata.tmp"] == (self / ".metadata").stat().st_size
            )
            assert events[-1] == f"sync {self.name}", "the directory comes after all of its files"
            events.append("publish")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    folder = tmp_path / "run" / "checkpoints"
    folder.parent.mkdir()
    save(folder, 1)
    assert events[0] == "sync run", "the folder's own name"
    assert events.count("publish") == 1 and events[-2:] == ["publish", "sync checkpoints"]


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        checkpoint.load_tensors(path, {"a": torch.zeros(60, 4)})
    with pytest.raises(CheckpointError, match="does not fit this configuration"):
        checkpoint.load_tensors(path, {"c": torch.zeros(1)})


def test_a_disk_that_cannot_be_read_is_no_other_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)
    # The file is as it was when it was verified, and the disk then fails.
    monkeypatch.setattr(StoreFiles, "create_stream", failing(errno.EIO, "Input/output error"))
    with pytest.raises(CheckpointError, match=r"step-00000001: cannot be read: .*Input/output error"):
        checkpoint.load_tensors(path, tensors(0.0))


def test_a_store_that_cannot_be_read_keeps_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is told to be damaged, or to be of another configuration, and nothing older is taken."""
    pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")
    folder = place("memory://store-errors/checkpoints")
    path, found = save(folder, 1), tensors(0.0)
    checkpoint.load_tensors(path, found)
    assert torch.equal(found["b"], tensors(1.0)["b"])
    why = failing(errno.EACCES, "no credentials found; set AWS_PROFILE")
    delta = files.manifest_digest(path)
    chained = {"step": 2, "base": {"name": path.name, "sha256": delta, "links": 1, "rows_of": []}}
    newer = checkpoint.save(folder, 2, tensors(2.0), chained, 9)
    assert checkpoint.find(folder).path == newer
    with monkeypatch.context() as patch:
        patch.setattr(StoreFiles, "create_stream", why)
        with pytest.raises(PermissionError, match="no credentials found; set AWS_PROFILE"):
            checkpoint.load_tensors(path, found)
        with pytest.raises(PermissionError):
            TensorReader(path)
    monkeypatch.setattr("trainer.checkpoint.files.manifest_digest", why)
    with pytest.raises(PermissionError):
        checkpoint.find(folder)


def failing(number: int, text: str) -> Callable[..., Any]:
    def refuse(*words: object, **_: object) -> None:
        raise OSError(number, text, str(words[-2 if len(words) > 2 else 0]))

    return refuse


def test_manifest_lists_every_file_with_its_digest(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in path.iterdir()} - {"manifest.json", "manifest.sha256"}
    for name, entry in files.items():
        assert entry["sha256"] == file_digest(path / name)
