"""The folder of caches: where it is, without a home folder too, and what goes from it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import ConfigError, SnapshotError
from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.vocabularies import all_large
from trainer.log.known_values import known_values
from trainer.serving.histories import HistoryStore
from trainer.storage import place, sorted_rows
from trainer.storage.fetched import drop_old, fetch, own_cache, shared_cache


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nobody knows this user, as in a container with a random user id -> the folder of temporary files."""

    def expanduser(path: str) -> str:
        return path

    monkeypatch.setattr(os.path, "expanduser", expanduser)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError):
        Path.home()
    return tmp_path


def test_without_a_home_folder_only_what_needs_a_cache_is_refused(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(homeless / "log", {"train": random_rows(1, Shape(users=9))})
    assert len(HistoryStore(log)) == len(HistoryStore(log, cache=homeless / "cache"))
    assert not (homeless / "cache").exists()
    assert own_cache(homeless) == homeless
    monkeypatch.setattr(sorted_rows, "_RUN", 2)
    assert len(HistoryStore(log, cache=homeless / "cache")) > 2
    with pytest.raises(ConfigError, match=r"has no home folder.* with --cache .*or set HOME"):
        HistoryStore(log)


def test_a_command_without_cache_option_goes_on_in_the_temporary_folder(
    homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, mine = homeless / "v.parquet", homeless / f"tandemrec-{os.getuid()}"
    pq.write_table(pa.table({"value": ["a", "b"], "id": [1, 2]}), file)
    digest = hashlib.sha256(b"a\nb\n").hexdigest()
    # A small vocabulary needs none.
    assert len(known_values(file, digest, shared_cache)) == 2 and not mine.exists()
    with all_large():
        with pytest.raises(ConfigError, match="has no home folder"):
            known_values(file, digest)
        assert len(known_values(file, digest, shared_cache)) == 2
    assert list(mine.glob("vocabularies/*")) and mine.stat().st_mode & 0o777 == 0o700
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    (homeless / f"tandemrec-{me + 1}").mkdir()
    with pytest.raises(ConfigError, match="belongs to another user; set HOME, or TMPDIR"):
        shared_cache()
    monkeypatch.undo()
    assert shared_cache() == own_cache()


def aged(path: Path) -> Path:
    os.utime(path, (0, 0))
    return path


def test_what_was_needed_lately_stays_and_what_a_killed_fetch_left_goes(tmp_path: Path) -> None:
    pytest.importorskip("upath", reason="places in stores need requirements/s3.txt")
    remote, local = place("memory://fetched/parts"), tmp_path / "v1"
    (remote / "t").write_bytes(b"abc")
    files = {"t": (3, hashlib.sha256(b"abc").hexdigest())}
    assert fetch(remote, files, local, SnapshotError)
    for name in (".t.0123456789ab", ".t.ba9876543210", "t.0123456789ab"):
        (local / name).write_bytes(b"ab")
    for name in (".t.0123456789ab", "t.0123456789ab", "t"):
        aged(local / name)
    # One that is young is being written, perhaps.
    assert not fetch(remote, files, local, SnapshotError)
    assert {path.name for path in local.iterdir()} == {"t", ".t.ba9876543210", "t.0123456789ab"}
    aged(local)
    drop_old(tmp_path, {"v1", "gone"})
    drop_old(tmp_path, set())
    assert local.is_dir()
    aged(local)
    drop_old(tmp_path, set())
    assert not local.exists()
    drop_old(tmp_path / "nowhere", set())
