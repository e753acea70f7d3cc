"""A sealed folder: its manifest and the manifest's digest on disk, and what is refused on reading."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from embeddings.errors import CheckpointError, DataError, SnapshotError, TandemError
from tests.programs import without_syncs
from trainer import sealed_folder
from trainer.sealed_folder import DIGEST, MANIFEST, Seal, entry_of, locked, publish, retire, sweep

NAMED = Seal(CheckpointError, "save it again", names_file=True)
BARE = Seal(SnapshotError, "take another copy")
TEXT = '{"files": "é"}'


@pytest.mark.parametrize(("seal", "named"), [(NAMED, "  manifest.json"), (BARE, "")])
def test_a_seal_is_the_manifest_and_its_digest(tmp_path: Path, seal: Seal, named: str) -> None:
    seal.write(tmp_path, TEXT)
    assert (tmp_path / MANIFEST).read_bytes() == TEXT.encode()
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    assert (tmp_path / DIGEST).read_text(encoding="utf-8") == f"{digest}{named}\n"
    assert seal.read(tmp_path) == TEXT.encode()


@pytest.mark.parametrize("seal", [NAMED, BARE])
@pytest.mark.parametrize("name", [MANIFEST, DIGEST])
def test_a_flipped_bit_or_a_missing_file_is_refused_with_place_and_remedy(
    tmp_path: Path, seal: Seal, name: str
) -> None:
    seal.write(tmp_path, TEXT)
    file, content = tmp_path / name, bytearray((tmp_path / name).read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        TandemError, match=f"{MANIFEST}: does not match .*{tmp_path / DIGEST} .*{seal.remedy}"
    ):
        seal.read(tmp_path)
    file.unlink()
    with pytest.raises(TandemError, match=f"{file}: unreadable: .*{seal.remedy}"):
        seal.read(tmp_path)


def test_white_space_after_a_digest_alone_is_no_damage(tmp_path: Path) -> None:
    for seal, fine in ((BARE, True), (NAMED, False)):
        seal.write(tmp_path, TEXT)
        (tmp_path / DIGEST).write_bytes((tmp_path / DIGEST).read_bytes().rstrip())
        if fine:
            assert seal.read(tmp_path) == TEXT.encode()
        else:
            with pytest.raises(CheckpointError, match="does not match"):
                seal.read(tmp_path)


def test_a_file_is_compared_with_its_entry(tmp_path: Path) -> None:
    seal = Seal(lambda path, problem: DataError(problem, file=path), "make it again")
    file = tmp_path / "part"
    file.write_bytes(b"rows")
    entry = entry_of(file)
    assert entry == {"bytes": 4, "sha256": hashlib.sha256(b"rows").hexdigest()}
    seal.check(file, entry["bytes"], entry["sha256"])
    damage: list[tuple[Callable[[], object], str]] = [
        (lambda: file.write_bytes(b"sowr"), "does not match the manifest"),
        (lambda: file.write_bytes(b"row"), "does not match the manifest"),
        (file.unlink, "unreadable"),
    ]
    for harm, problem in damage:
        harm()
        with pytest.raises(DataError, match=f"{file}: {problem}.*; make it again"):
            seal.check(file, entry["bytes"], entry["sha256"])


def test_a_published_folder_has_its_name_only_once_it_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part, final = tmp_path / "part", tmp_path / "final"
    (part / "inner").mkdir(parents=True)
    (part / "inner" / "file").write_text("x", encoding="utf-8")
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr("trainer.sealed_folder.sync", lambda path: synced.append((path, final.exists())))
    publish(part, final)
    before = {path for path, there in synced if not there}
    assert before == {part, part / "inner", part / "inner" / "file"}
    assert synced[-1] == (tmp_path, True) and (final / "inner" / "file").is_file()


def test_what_has_the_name_waits_aside_and_comes_back_if_nothing_takes_its_place(tmp_path: Path) -> None:
    part, final, aside = (tmp_path / name for name in ("part", "final", "aside"))
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(FileNotFoundError):
        publish(part, final, aside=aside, synced=True)
    assert (final / "old").exists() and not aside.exists()
    part.mkdir()
    publish(part, final, aside=aside)
    assert not (final / "old").exists() and (aside / "old").exists() and not part.exists()


def test_a_folder_has_a_temporary_name_before_anything_of_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v1").mkdir()
    deleted: list[Path] = []
    remove = sealed_folder.remove_folder
    monkeypatch.setattr(
        sealed_folder, "remove_folder", lambda path, strict: (deleted.append(path), remove(path))
    )
    retire(tmp_path / "v1", "v1")
    assert [path.name.partition(".tmp-")[0] for path in deleted] == ["v1"] and not list(tmp_path.iterdir())


def test_a_sweep_heeds_the_locks_of_others_unless_there_can_be_none(tmp_path: Path) -> None:
    for name in ("a.tmp-1", "a.tmp-2", "b.tmp-1", "a"):
        (tmp_path / name).mkdir()
    with locked(tmp_path / "a.tmp-2.lock", "nothing"):
        sweep(tmp_path, "a.tmp-*")
        assert (tmp_path / "a.tmp-1").exists(), "it has no lock file, so it may be anybody's"
        sweep(tmp_path, "a.tmp-*", owns=True)
        assert not (tmp_path / "a.tmp-1").exists() and (tmp_path / "a.tmp-2").exists()
    sweep(tmp_path, "*.tmp-*", owns=True, alone=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_system_itself_syncs_what_is_given_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere in the tests nothing waits for the disk."""
    synced: list[str] = []

    def sync(descriptor: int) -> None:
        without_syncs.fsync(descriptor)
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)

    monkeypatch.setattr(os, "fsync", sync)
    (tmp_path / "folder").mkdir()
    NAMED.write(tmp_path / "folder", TEXT)
    sealed_folder.sync_tree(tmp_path)
    assert {MANIFEST, DIGEST, "folder", tmp_path.name} <= set(synced)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(10_000)
    with pytest.raises(OSError, match="Bad file descriptor"):
        without_syncs.checked(10_000)
