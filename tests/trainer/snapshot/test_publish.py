"""Publishing: whole or not at all, in order, whoever reads or writes beside it."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest

from embeddings.errors import SnapshotError
from pipelines import export_version
from tests.helpers.models import small_log
from tests.helpers.snapshots import exported, publish_copy, save_run
from trainer.snapshot import load_snapshot, publishing, resolve
from trainer.snapshot.partial_model import PartialModel
from trainer.snapshot.publishing import drafting
from trainer.storage import place


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish")
    return save_run(folder / "run", small_log(folder / "log"))


@pytest.fixture(scope="module")
def version(run: Path) -> Path:
    return exported(run, run.parent / "first")


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_number_that_another_export_took_meanwhile_is_not_given_again(
    version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store: another export publishes between the listing of numbers and the claim of one."""
    pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")
    root = place("memory://snapshots/two-at-once")
    first = publish_copy(root, version)
    sealed = (first / "manifest.json").read_bytes()
    (root / "LATEST").unlink()
    monkeypatch.setattr(publishing, "_versions", lambda root: [])
    second = publish_copy(root, version)
    assert (first.name, second.name) == ("v00000001", "v00000002")
    assert (first / "manifest.json").read_bytes() == sealed
    assert not (first / "claim").exists() and not (second / "claim").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_a_reader_polling_through_forty_publishes_sees_whole_versions_only(
    version: Path, tmp_path: Path, keep: int
) -> None:
    """Every fourth publish waits for a version to be read: a reader gives up where all go while it reads."""
    publish_copy(tmp_path, version)
    seen: list[int] = []
    problems: list[BaseException] = []
    done = threading.Event()

    def poll() -> None:
        try:
            while not done.is_set():
                snapshot = load_snapshot(tmp_path)
                assert snapshot.self_check() == 0
                assert snapshot.path.name == f"v{snapshot.manifest.number:08d}"
                seen.append(snapshot.manifest.number)
        except BaseException as error:
            problems.append(error)

    reader = threading.Thread(target=poll)
    reader.start()
    for number in range(2, 42):
        assert publish_copy(tmp_path, version, keep).name == f"v{number:08d}"
        before, patience = len(seen), time.monotonic() + 60
        while number % 4 == 0 and len(seen) == before and reader.is_alive() and time.monotonic() < patience:
            time.sleep(0.001)
    done.set()
    reader.join(timeout=60)
    assert not problems, problems
    assert len(set(seen)) > 3 and seen == sorted(seen)
    assert len(names(tmp_path)) == keep + 1 and resolve(tmp_path).name == "v00000041"


def test_exports_at_once_into_one_folder_get_numbers_of_their_own(version: Path, tmp_path: Path) -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.extend(publish_copy(tmp_path, version).name for _ in range(5)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(found) == [f"v{i:08d}" for i in range(1, 21)]
    assert names(tmp_path) == ["LATEST", *sorted(found)] and resolve(tmp_path).name == "v00000020"
    for name in found:
        assert load_snapshot(tmp_path / name).manifest.number == int(name[1:])


def test_numbers_are_never_given_out_twice(version: Path, tmp_path: Path) -> None:
    for _ in range(3):
        publish_copy(tmp_path, version)
    shutil.rmtree(tmp_path / "v00000003")
    assert publish_copy(tmp_path, version).name == "v00000004"


def test_keep_spares_what_kept_deltas_build_on(run: Path, tmp_path: Path) -> None:
    exported(run, tmp_path)
    exported(run, tmp_path)
    exported(run, tmp_path, since="1")
    exported(run, tmp_path, since="3", keep=2)
    assert names(tmp_path) == ["LATEST", "v00000001", "v00000003", "v00000004"]
    assert load_snapshot(tmp_path).self_check() == 0


def test_leftovers_of_killed_exports_are_swept_and_running_ones_left_alone(
    version: Path, tmp_path: Path
) -> None:
    publish_copy(tmp_path, version)
    (tmp_path / ".tmp-killed" / "tables").mkdir(parents=True)
    with drafting(tmp_path) as running:
        (running / "x").write_text("")
        publish_copy(tmp_path, version)
        assert (running / "x").exists()
        assert not (tmp_path / ".tmp-killed").exists()
    assert names(tmp_path) == ["LATEST", "v00000001", "v00000002"]


def test_a_failed_export_leaves_nothing(run: Path, version: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Scores that differ are found before anything is published."""
    true = PartialModel.score
    monkeypatch.setattr(PartialModel, "score", lambda self, batch: true(self, batch) + 1e-7)
    for root in (tmp_path / "new", tmp_path / "old"):
        before = [publish_copy(root, version).name] if root.name == "old" else []
        with pytest.raises(SnapshotError, match="on this very machine"):
            exported(run, root)
        assert (names(root) if root.exists() else []) == (["LATEST", *before] if before else [])
    monkeypatch.setattr(PartialModel, "score", lambda self, batch: true(self, batch) + 6e-4)
    with pytest.raises(SnapshotError, match=r"by up to 0\.000\d+, 0\.000\d+ on average"):
        exported(run, tmp_path / "new", "fp16", "fp16")


def test_a_base_that_goes_away_meanwhile_is_an_error(run: Path, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    exported(run, tmp_path)
    exported(run, tmp_path)
    check = export_version._check

    def then_delete(*given):  # type: ignore[no-untyped-def]
        parity = check(*given)
        shutil.rmtree(tmp_path / "v00000001")
        return parity

    monkeypatch.setattr(export_version, "_check", then_delete)
    with pytest.raises(SnapshotError, match="went away meanwhile"):
        exported(run, tmp_path, since="1")
    assert names(tmp_path) == ["LATEST", "v00000002"] and resolve(tmp_path).name == "v00000002"
