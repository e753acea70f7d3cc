"""Versions in a cache: fetched by several processes at once, again, and from a store that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from embeddings.errors import UnavailableError
from tests.helpers.models import small_log
from tests.helpers.snapshots import exported, publish_copy, save_run
from trainer.sealed_folder import DIGEST, MANIFEST
from trainer.serving.versions import Versions
from trainer.snapshot import load_fetched, load_snapshot
from trainer.snapshot.fetching import fetched
from trainer.storage import fetched as cache_module
from trainer.storage import objects, place

pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that differ in their weights."""
    folder = tmp_path_factory.mktemp("versions")
    log = small_log(folder / "log")
    return [
        exported(save_run(folder / f"run{seed}", log, "dare", f"train.seed={seed}"), folder / f"out{seed}")
        for seed in (1, 2)
    ]


@pytest.fixture
def root(tmp_path: Path, versions: list[Path]) -> Iterator[Path]:
    root = place(f"memory://fetching/{tmp_path.name}")
    publish_copy(root, versions[0])
    yield root
    objects.remove(root, ())


def inodes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_what_is_there_is_not_written_again(root: Path, tmp_path: Path) -> None:
    """So another process that looks meanwhile never finds half of it."""
    local, before = fetched(root, tmp_path), inodes(tmp_path)
    assert {MANIFEST, DIGEST} <= {path.name for path in before}
    with patch.object(Path, "write_bytes", side_effect=AssertionError):
        assert fetched(root, tmp_path) == local
    assert inodes(tmp_path) == before


@pytest.mark.parametrize("name", [MANIFEST, DIGEST])
@pytest.mark.parametrize("keep", [0, 40])
def test_a_seal_that_is_half_written_costs_no_table(root: Path, tmp_path: Path, name: str, keep: int) -> None:
    local = fetched(root, tmp_path)
    before, content = inodes(tmp_path), (local / name).read_bytes()
    (local / name).write_bytes(content[:keep])
    assert fetched(root, tmp_path) == local and (local / name).read_bytes() == content
    after = inodes(tmp_path)
    assert after.keys() == before.keys()
    assert {path for path in before if after[path] != before[path]} <= {local / name}


def test_another_version_of_the_same_number_takes_its_place(
    root: Path, versions: list[Path], tmp_path: Path
) -> None:
    local = fetched(root, tmp_path)
    (local / "of_the_former").write_text("")
    objects.remove(root, ())
    publish_copy(root, versions[1])
    again = load_fetched(root, tmp_path)
    assert again.path == local and not (local / "of_the_former").exists()
    # Publishing says when, and no more.
    both = again.manifest, load_snapshot(versions[1]).manifest
    own, copied = (each.model_dump(exclude={"exported_at"}) for each in both)
    assert own == copied
    # Neither a lock nor what was removed stays.
    assert list(local.parent.iterdir()) == [local]


def test_a_store_that_fails_for_a_moment_costs_no_version(
    root: Path, versions: list[Path], tmp_path: Path
) -> None:
    """The look has failed, the version is not refused, and the next look takes it."""
    outcomes: list[str] = []
    serving = Versions(root, None, outcomes.append, cache=tmp_path)
    publish_copy(root, versions[1])
    busy = OSError(errno.EBUSY, os.strerror(errno.EBUSY), "some/file")
    with (
        patch.object(cache_module, "pieces", side_effect=busy),
        pytest.raises(UnavailableError, match=r"v00000002: cannot be fetched to .*busy \(some/file\)$"),
    ):
        serving.reload(retry=False)
    assert serving.refused is None and serving.newer() is not None
    assert serving.reload(retry=False) and serving.scorer.version == "v00000002"
    assert outcomes == ["failed", "switched"]
