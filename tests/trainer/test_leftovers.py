"""What killed processes leave behind goes with the next start; what others own, or are writing, stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embeddings.errors import DataError
from tests.helpers.logs import small_log
from trainer import sealed_folder as durable
from trainer.log import writer as log_writer
from trainer.log.schema import moved_away, read_manifest
from trainer.log.writer import staged
from trainer.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
# Ends by a signal inside of a scratch folder, or while an overwrite has moved the older log away.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from trainer.log import writer as log_writer
log, other, at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
log_writer.exchange = lambda one, two: False
renamed, rename = [], Path.rename
def dying(self, target):
    if renamed and at == "renames":
        os.kill(os.getpid(), signal.SIGKILL)
    renamed.append(self)
    return rename(self, target)
Path.rename = dying
with log_writer.staged(log, overwrite=True) as part:
    shutil.copytree(other, part, dirs_exist_ok=True)
    if at == "body":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(log: Path, other: Path, at: str) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, log, other, at], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A log to replace, and what it is replaced with."""
    return small_log(tmp_path / "logs" / "log"), small_log(tmp_path / "other", seed=1)


def test_a_killed_writer_is_swept_and_a_running_one_left_alone(two: tuple[Path, Path]) -> None:
    log, other = two
    killed(log, other, "body")
    left = [path for path in log.parent.iterdir() if path.is_dir() and path != log]
    assert len(left) == 1 and (left[0] / "manifest.json").is_file()
    foreign = log.with_name("log.tmp-20240101")
    foreign.mkdir()
    with staged(log, overwrite=True) as running:
        assert not left[0].exists()
        with pytest.raises(ZeroDivisionError), staged(log, overwrite=True):
            raise ZeroDivisionError
        assert running.is_dir()
        with pytest.raises(ZeroDivisionError), staged(log.with_name("log.tmp"), overwrite=True):
            raise ZeroDivisionError
        assert running.is_dir()
        (running / "x").write_text("")
    assert names(log.parent) == ["log", "log.tmp-20240101"] and names(log) == ["x"]


def test_a_log_that_was_being_replaced_comes_back(
    two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    log, other = two
    before = read_manifest(log)
    killed(log, other, "renames")
    assert not log.exists()
    with pytest.raises(DataError, match=r"log\.tmp-\w+-old: ingest again .*or rename it back"):
        read_manifest(log)
    with pytest.raises(DataError, match="is a sequence log already"), staged(log, overwrite=False):
        pytest.fail("the older log was not there")
    assert read_manifest(log) == before and names(log.parent) == ["log"]
    assert f"{log}: restored" in capsys.readouterr().err


def test_an_empty_folder_in_its_place_does_not_cost_the_older_log(two: tuple[Path, Path]) -> None:
    log, other = two
    before = read_manifest(log)
    killed(log, other, "renames")
    log.mkdir()
    with pytest.raises(DataError, match="is a sequence log already"), staged(log, overwrite=False):
        pytest.fail("the older log was not there")
    assert read_manifest(log) == before


def test_an_overwrite_never_leaves_the_path_empty(
    two: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system can exchange two folders; elsewhere the test before is what holds."""
    log, other = two
    one, another = log.parent / "one", log.parent / "another"
    one.mkdir(), another.mkdir()
    (one / "x").touch()
    able = durable.exchange(one, another)
    assert (another / "x").exists() == able
    monkeypatch.setattr(log_writer, "exchange", lambda *folders: able and durable.exchange(*folders))
    renamed: list[Path] = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, to: (renamed.append(path), rename(path, to))[1])
    with staged(log, overwrite=True) as part:
        (part / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    assert (log not in renamed) == able
    assert (log / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()
    assert not moved_away(part).exists() and not part.exists()


def test_a_link_to_a_log_stays_a_link(two: tuple[Path, Path], tmp_path: Path) -> None:
    log, other = two
    (tmp_path / "link").symlink_to(log)
    with staged(tmp_path / "link", overwrite=True) as part:
        assert part.parent == log.parent
        (part / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    assert (tmp_path / "link").is_symlink() and names(log) == ["manifest.json"]


def test_a_started_training_forgets_weights_that_a_killed_one_was_reading(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.first_weights.mkdir()
    with folder.lock():
        assert not folder.first_weights.exists()


def test_parts_of_small_files_go_with_their_dead_writers(tmp_path: Path) -> None:
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    host, pid = durable._host(), int(dead.stdout)
    file, old = tmp_path / "a.json", time.time() - 2 * 86_400
    there = {
        f".a.json.tmp-{host}-{pid}": False,
        f".a.json.tmp-{host}-{os.getppid()}": True,
        f".a.json.tmp-another.host-{pid}": True,
        ".a.json.tmp-77": False,  # of an earlier version
        ".a.json.tmp-mine": True,
        f".b.json.tmp-{host}-{pid}": True,
    }
    for name in there:
        (tmp_path / name).write_text("")
    os.utime(tmp_path / ".a.json.tmp-77", (old, old))
    durable.write_text(file, "{}")
    assert names(tmp_path) == sorted(["a.json", *(name for name, stays in there.items() if stays)])
