"""Folders that do not sync, do not lock and do not rename onto a file: work goes on, and one line says so."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import ConfigError, DataError
from pipelines.ingest.ingest import ingest
from tests.helpers.rawlogs import config, events, rows, write
from trainer import sealed_folder as durable
from trainer.checkpoint import files as checkpoint_files
from trainer.log.schema import read_manifest
from trainer.run_folder import RunFolder
from trainer.snapshot.publishing import drafting

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")

LACKING = ("EINVAL", "ENOSYS", "EOPNOTSUPP")
Break = Callable[[str, str], None]


def raising(name: str, path: object = "") -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), str(path))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Break:
    """Lets a call fail as on some network file system; what was said before is forgotten."""
    monkeypatch.setattr(durable, "voice", durable.Voice())
    fsync, open_ = os.fsync, os.open

    def fail(call: str, name: str) -> None:
        def no_sync(descriptor: int) -> None:
            if stat.S_ISDIR(os.fstat(descriptor).st_mode) == (call == "sync of a folder"):
                raise raising(name)
            fsync(descriptor)

        def no_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_ACCMODE == os.O_RDONLY and Path(path).is_dir():
                raise raising(name, path)
            return open_(path, flags, *rest, **named)

        def no_lock(*_: object) -> None:
            raise raising(name)

        if call.startswith("sync"):
            monkeypatch.setattr(os, "fsync", no_sync)
        elif call == "open":
            monkeypatch.setattr(os, "open", no_open)
        else:
            monkeypatch.setattr(fcntl, "flock", no_lock)

    return fail


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize("call", ["sync of a folder", "sync of a file"])
def test_what_cannot_be_synced_is_said_once(
    call: str, name: str, tmp_path: Path, broken: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(call, name)
    (tmp_path / "file").write_text("")
    for _ in range(2):
        durable.sync(tmp_path if "folder" in call else tmp_path / "file")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tandemrec: warning: {tmp_path}: this file system does not sync {call[10:]}s (")
    assert "a power cut may lose what was saved last" in line


@pytest.mark.parametrize("name", ["EISDIR", "EACCES"])
def test_a_folder_that_cannot_be_opened_is_deleted_and_passed_over(
    name: str, tmp_path: Path, broken: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    broken("open", name)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "a" / "b")
    durable.sync(tmp_path)
    durable.remove_folder(tmp_path / "a", strict=True)
    assert not list(tmp_path.iterdir())
    assert "does not sync folders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "name"), [("sync of a folder", "EIO"), ("sync of a file", "ENOSPC"), ("open", "EMFILE")]
)
def test_real_errors_stay_errors(call: str, name: str, tmp_path: Path, broken: Break) -> None:
    (tmp_path / "file").write_text("")
    broken(call, name)
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        durable.sync(tmp_path if "file" not in call else tmp_path / "file")


@pytest.mark.parametrize("name", [*LACKING, "ENOLCK"])
def test_a_run_trains_without_locks_and_says_what_goes_unnoticed(
    name: str, tmp_path: Path, broken: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    broken("flock", name)
    with RunFolder(tmp_path).lock():
        pass
    assert "keeps no locks" in (said := capsys.readouterr().err)
    assert "two trainings in one folder go unnoticed" in said


def test_a_lock_that_breaks_and_one_that_is_held_are_errors(tmp_path: Path, broken: Break) -> None:
    folder = RunFolder(tmp_path)
    with folder.lock(), pytest.raises(ConfigError, match="another training is running"), folder.lock():
        pytest.fail("two hold one lock")
    assert not list(tmp_path.iterdir())
    broken("flock", "EIO")
    with pytest.raises(ConfigError, match=r"cannot be locked: .*Input/output error"), folder.lock():
        pytest.fail("a broken lock was held")


def test_other_ranks_keep_quiet(tmp_path: Path, broken: Break, capsys: pytest.CaptureFixture[str]) -> None:
    broken("sync of a folder", "EINVAL")
    durable.voice.silent = True
    durable.sync(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_log_a_checkpoint_and_a_snapshot_are_written_where_all_of_it_is_lacking(
    tmp_path: Path, broken: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "events.parquet", events())
    ingest(source, tmp_path / "here", config("next-basket"))
    for call, name in (("sync of a folder", "EINVAL"), ("open", "EISDIR"), ("flock", "ENOLCK")):
        broken(call, name)
    for _ in range(2):
        ingest(source, tmp_path / "log", config("next-basket"), overwrite=True)
    assert rows(tmp_path / "log") == rows(tmp_path / "here")
    checkpoints, part = tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-00000001.tmp-x"
    checkpoint_files.prepare(checkpoints, part)
    checkpoint_files.seal(part, checkpoint_files.write_state(part, {}))
    checkpoint_files.publish(part, checkpoints / "step-00000001")
    checkpoint_files.verify(checkpoints / "step-00000001")
    with drafting(tmp_path / "snapshots") as draft:
        assert draft.is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"events.parquet", "here", "log", "checkpoints"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(set(said)) == 3, said


@pytest.mark.parametrize("name", ["EEXIST", "EACCES", "EOPNOTSUPP"])
def test_a_file_is_replaced_where_nothing_is_renamed_onto_a_name(
    name: str,
    tmp_path: Path,
    broken: Break,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del broken
    rename, file = os.replace, tmp_path / "file"

    def careful(source: Any, target: Any) -> None:
        if Path(target).exists():
            raise raising(name, target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", careful)
    monkeypatch.setattr(os, "rename", careful)
    for text in ("1", "2"):
        durable.write_text(file, text)
        assert file.read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert "cannot rename onto a file" in capsys.readouterr().err


def test_a_full_disk_ends_an_ingest_in_one_line(tmp_path: Path, broken: Break) -> None:
    source = write(tmp_path / "events.parquet", events())
    broken("sync of a file", "ENOSPC")
    with pytest.raises(DataError, match=r"log: cannot be made: .*No space left"):
        ingest(source, tmp_path / "log", config("next-basket"))
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]
    with pytest.raises(DataError, match="no such file"):
        read_manifest(tmp_path / "log")
