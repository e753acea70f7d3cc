"""Against a server of S3's protocol that fails: retried to success, or one clear error and nothing lost."""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.errors import CheckpointError, ConfigError, DataError, SnapshotError
from tests.helpers.logs import small_log
from tests.helpers.object_store import PAGE, SECRET, Store, few
from trainer.checkpoint import files, save_load
from trainer.checkpoint.tensors import TensorReader
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.ranks.process_group import process_group
from trainer.run_folder import MetricsLog, RunFolder
from trainer.sealed_folder import DIGEST, MANIFEST, file_digest
from trainer.storage import objects, place, s3
from trainer.storage.places import store_of
from trainer.storage.ranges import footer_of
from trainer.storage.spool import Spool

SMALL: dict[str, Any] = {"history_length": 16, "batch_candidates": 24, "shuffle_row_groups": 2}


def upload(folder: Path, target: Path) -> Path:
    objects.remove(target, ())
    objects.publish(folder, target, (MANIFEST, DIGEST))
    return target


def steps(log: Path, **changes: Any) -> list[torch.Tensor]:
    """Ids and labels of an epoch."""
    reader = SequenceLogReader(DataConfig(log=log, **SMALL, **changes), "train", None, seed=3)
    with closing(reader.steps()) as found:
        return [part for step in found for part in (step.batch.features.values(), step.batch.labels)]


def test_a_log_is_read_by_ranges_as_a_local_one(store: Store, tmp_path: Path) -> None:
    local = small_log(tmp_path / "log", users=60)
    remote = upload(local, store.bucket / "logs" / "a")
    store.seen()
    mine, theirs = steps(local), steps(remote, workers=3)
    assert len(mine) == len(theirs) > 10
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    reads = [entry for entry in store.seen() if entry[0] == "GET" and ".parquet" in entry[1]]
    assert reads and all(entry[2].startswith("bytes=") for entry in reads)
    file = next(path for path in (local / "train").iterdir())
    assert footer_of(remote / "train" / file.name).equals(footer_of_local(file))
    # Some columns only, of files that have more.
    wanted = SequenceLogReader(DataConfig(log=remote, **SMALL, workers=0), "train", {"item_id": 60})
    store.seen()
    with closing(wanted.steps()) as found:
        next(iter(found))
    part = sum(entry[3] for entry in store.seen() if "train/" in entry[1])
    assert 0 < part < sum(path.stat().st_size for path in (local / "train").iterdir())


def footer_of_local(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.read_metadata(file)


def test_what_is_checked_of_a_log(store: Store, tmp_path: Path) -> None:
    local = small_log(tmp_path / "log")
    remote = upload(local, store.bucket / "logs" / "checked")
    store.seen()
    SequenceLogReader(DataConfig(log=remote, **SMALL), "train", None)
    assert not [entry for entry in store.seen() if entry[0] == "GET" and ".parquet" in entry[1]]
    SequenceLogReader(DataConfig(log=remote, **SMALL, verify=True), "train", None)
    whole = sum(entry[3] for entry in store.seen() if ".parquet" in entry[1])
    assert whole == sum(path.stat().st_size for path in (local / "train").iterdir())
    # Another content of the same size: found by digests, or when its pages are read; another size at once.
    name = sorted(path.name for path in (local / "train").iterdir())[0]
    content = bytearray((local / "train" / name).read_bytes())
    content[40:2000] = bytes(1960)
    (remote / "train" / name).write_bytes(bytes(content))
    with pytest.raises(DataError, match="SHA-256"):
        SequenceLogReader(DataConfig(log=remote, **SMALL, verify=True), "train", None)
    with pytest.raises(DataError, match=rf"s3://.*{name}"):
        steps(remote)
    (remote / "train" / name).write_bytes(bytes(content[:-1]))
    with pytest.raises(DataError, match=r"bytes, the manifest says"):
        steps(remote)
    (remote / "train" / name).unlink()
    with pytest.raises(DataError, match="named in the manifest but missing"):
        steps(remote)


def test_faults_that_pass_are_retried(store: Store, tmp_path: Path) -> None:
    local = small_log(tmp_path / "log")
    remote = upload(local, store.bucket / "logs" / "faulty")
    store.faults(
        ("GET", "part-00000", "error:500:InternalError", 1),
        ("GET", "part-00001", "error:503:SlowDown", 2),
        ("GET", "part-00000", "truncated", 1),
        ("GET", "part-00001", "reset", 1),
        ("GET", "manifest.json", "slow:0.3", 1),
        ("HEAD", "manifest", "error:500:InternalError", 1),
    )
    mine, theirs = steps(local), steps(remote)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert sum(entry[3] == 0 for entry in store.seen() if entry[0] == "GET") >= 4


def test_a_silent_answer_is_asked_for_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3.ObjectStore, "read_timeout", 0.5)
    s3.ObjectStore.clear_instance_cache()
    file = store.bucket / "silent"
    file.write_bytes(b"here")
    store.faults(("GET", "silent", "slow:1.5", 1))
    assert file.read_bytes() == b"here"
    assert sum("silent" in path for method, path, *_ in store.seen() if method == "GET") == 2


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("error:403:ExpiredToken", "credentials have expired; renew them"),
        ("error:403:AccessDenied", "access denied"),
        ("error:403:InvalidAccessKeyId", "does not know these credentials"),
        ("error:404:NoSuchBucket", "no such bucket"),
        ("error:500:InternalError", "the store failed, again after all retries"),
        ("error:503:SlowDown", "slow down, again after all retries"),
        ("truncated", "connection broke, again after all retries"),
        ("reset", "after all retries"),
    ],
)
def test_faults_that_stay_are_one_error(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, says: str
) -> None:
    remote = store.bucket / "logs" / "failing"
    if not (remote / MANIFEST).exists():
        upload(small_log(tmp_path / "log"), remote)
    few(monkeypatch)
    store.faults(("GET", "part-0", kind, 1000))
    with pytest.raises(DataError) as caught:
        steps(store.bucket / "logs" / "failing")
    text = str(caught.value)
    assert says in text and "s3://tandem-tests/logs/failing/train/part-0" in text and SECRET not in text


def test_no_server_and_no_credentials(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(OSError, match=r"cannot be reached.*AWS_ENDPOINT_URL") as caught:
            (store.bucket / "x").read_bytes()
        assert caught.value.filename == "s3://tandem-tests/x"
    s3.ObjectStore.clear_instance_cache()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    with pytest.raises(OSError, match=r"no credentials found.*AWS_PROFILE"):
        (store.bucket / "x").read_bytes()
    s3.ObjectStore.clear_instance_cache()


def test_questions_do_not_take_a_failure_for_no(store: Store) -> None:
    (store.bucket / "q" / "there").write_bytes(b"1")
    assert (store.bucket / "q").is_dir() and not (store.bucket / "q").is_file()
    store.faults(("GETHEAD", "q", "error:403:ExpiredToken", 1000))
    for ask in ("exists", "is_file", "is_dir"):
        with pytest.raises(PermissionError):
            getattr(store.bucket / "q" / "there", ask)()
    with pytest.raises(PermissionError):
        files.checkpoints(store.bucket / "q")


def test_an_object_is_whole_or_not_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART", 5 << 20)
    content = os.urandom(11 << 20)
    target = store.bucket / "big"
    with pytest.raises(KeyError), objects.writing(target) as file:
        file.write(content)
        raise KeyError
    assert not target.exists()
    # A part is sent again; the upload in parts is ended where the body failed.
    store.faults(("PUT", r"big\?partNumber=2", "error:500:InternalError", 1))
    with objects.writing(target) as file:
        for start in range(0, len(content), 1 << 20):
            file.write(content[start : start + (1 << 20)])
    asked = [(method, path.partition("?")[2]) for method, path, *_ in store.seen() if "big" in path]
    assert any(method == "DELETE" and "uploadId" in query for method, query in asked)
    assert sum("partNumber=2" in query for _, query in asked) >= 2
    assert target.read_bytes() == content
    monkeypatch.setattr(objects, "PIECE", 1 << 20)
    import hashlib

    assert file_digest(target) == hashlib.sha256(content).hexdigest()


def test_an_answer_that_was_lost_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "PART", 5 << 20)
    store.faults(
        ("PUT", "claim", "lost", 1), ("POST", r"parts\?uploadId", "lost", 1), ("PUT", "short", "lost", 1)
    )
    assert objects.create(store.bucket / "mine" / "claim") and not objects.create(
        store.bucket / "mine" / "claim"
    )
    for name, size in (("parts", 6 << 20), ("short", 3)):
        with objects.writing(store.bucket / "mine" / name) as file:
            file.write(bytes(size))
        assert (store.bucket / "mine" / name).stat().st_size == size


def test_an_upload_that_fails_at_its_end_is_ended(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    monkeypatch.setattr(objects, "PART", 5 << 20)
    for method, query in (("PUT", "partNumber=1"), ("POST", "uploadId")):
        store.faults((method, rf"ended\?.*{query}", "error:403:AccessDenied", 9))
        with pytest.raises(PermissionError), objects.writing(store.bucket / "ended") as file:
            file.write(bytes(6 << 20))
    fs, _ = store_of(store.bucket)
    assert fs.list_multipart_uploads(store.name) == [] and not (store.bucket / "ended").exists()


@pytest.mark.parametrize(
    "name", ["a b", "ü/日本", "x+y", "p%20q%", "h#sh", "q?m", "am&p=1;'", "star*", "br[0]", "back\\slash"]
)
def test_any_name_is_a_name(store: Store, name: str) -> None:
    folder, other = store.bucket / "names" / name, store.bucket / "names" / "other"
    for each in (folder, other):
        (each / "f").write_bytes(name.encode())
    with objects.writing(folder / "g") as file:
        file.write(b"1")
    assert objects.sizes(folder) == {"f": len(name.encode()), "g": 1} and folder.is_dir()
    assert objects.read_range(folder / "f", 0, 1) == name.encode()[:1]
    assert sorted(path.name for path in objects.listed(folder)) == ["f", "g"]
    assert str(place(str(folder / "f"))) == str(folder / "f")
    objects.remove(folder, ("g",), strict=True)
    # Nothing but that folder, though its name may be a pattern of others.
    assert objects.sizes(store.bucket / "names") == {"other/f": len(name.encode())}


def test_a_pattern_in_a_name_deletes_no_other_object(store: Store) -> None:
    folder = store.bucket / "patterns"
    for name in ("a*/x*", "a*/x?", "ab/xy", "a/x*"):
        (folder / name).write_bytes(b"1")
    objects.remove(folder / "a*", (), strict=True)
    assert set(objects.sizes(folder)) == {"ab/xy", "a/x*"}


def test_a_whole_bucket_is_a_folder_that_stays(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    fs, _ = store_of(store.bucket)
    fs.call_s3("create_bucket", Bucket="all-of-it")
    bucket = place("s3://all-of-it")
    # More names than one answer holds.
    names = [f"k{number:04d}/x" for number in range(2 * PAGE + 1)]
    objects.in_parallel(lambda name: (bucket / name).write_bytes(b""), names)
    assert sorted(objects.sizes(bucket)) == names
    assert len(objects.listed(bucket)) == len(objects.unfinished(bucket, "none", -60)) == len(names)
    objects.remove(bucket, (), strict=True)
    assert bucket.exists() and objects.sizes(bucket) == {}
    with pytest.raises(IsADirectoryError, match="is a bucket"):
        bucket.read_text()
    missing = place("s3://no-such-bucket-here")
    for ask in (missing.exists, missing.read_text, lambda: objects.listed(missing), (missing / "x").is_file):
        with pytest.raises(OSError, match=r"no such bucket|is a bucket"):
            ask()


def test_what_a_store_does_not_delete_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answer deletes many objects, and says of each whether it could."""
    folder = store.bucket / "stays"
    for name in "ab":
        (folder / name).write_bytes(b"1")
    real = s3.ObjectStore._call_s3

    async def call(self: Any, method: str, *args: Any, **options: Any) -> Any:
        if method == "delete_objects":
            return {
                "Errors": [
                    {"Key": each["Key"], "Code": "InternalError"} for each in options["Delete"]["Objects"]
                ]
            }
        return await real(self, method, *args, **options)

    monkeypatch.setattr(s3.ObjectStore, "_call_s3", call)
    store.faults(("DELETE", "stays/b", "error:403:AccessDenied", 1000))
    with pytest.raises(PermissionError, match="access denied"):
        objects.remove(folder, (), strict=True)
    assert set(objects.sizes(folder)) == {"b"}
    store.faults()
    objects.remove(folder, (), strict=True)
    assert objects.sizes(folder) == {}


def test_a_store_that_asks_to_slow_down_is_waited_for(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests it refuses: there is no quota that they use up."""
    monkeypatch.setattr("random.random", lambda: 0.001)
    file = store.bucket / "burst"
    file.write_bytes(b"here")
    store.faults(("GET", "burst", "error:503:SlowDown", 150))
    assert (
        objects.in_parallel(lambda _: objects.read_range(file, 0, 4), range(64), at_once=64) == [b"here"] * 64
    )


@pytest.mark.parametrize(
    ("kind", "says", "of_head"),
    [
        ("301:PermanentRedirect", "another region; set AWS_REGION", "another region; set AWS_REGION"),
        (
            "400:AuthorizationHeaderMalformed",
            "another region; set AWS_REGION",
            "have expired, or .* another region",
        ),
        (
            "403:RequestTimeTooSkewed",
            "clock of this machine is wrong",
            "or the clock of this machine is wrong",
        ),
        ("403:InvalidObjectState", "is archived; restore it", r"refused \(403\)"),
        ("404:NoSuchUpload", "ended by somebody else", "ended by somebody else"),
        ("403:QuotaExceeded", "QuotaExceeded", r"refused \(403\)"),
        ("400:KeyTooLongError", r"told to fail \(KeyTooLongError\)", r"refused \(400\)"),
    ],
)
def test_what_no_retry_mends_says_what_to_do(
    store: Store, monkeypatch: pytest.MonkeyPatch, kind: str, says: str, of_head: str
) -> None:
    few(monkeypatch)
    file = store.bucket / "refused"
    store.faults(("GET HEAD PUT", "refused", f"error:{kind}", 1000))
    for ask, expected in (
        (lambda: objects.read_range(file, 0, 1), says),
        (lambda: file.write_bytes(b"1"), says),
        (file.stat, of_head),
    ):
        with pytest.raises(OSError, match=expected) as caught:
            ask()
        assert caught.value.filename == "s3://tandem-tests/refused"


def test_empty_folders_are_never_deleted_with_what_is_in_them(store: Store) -> None:
    (store.bucket / "kept" / "a").write_bytes(b"1")
    with pytest.raises(OSError, match="no empty folders"):
        (store.bucket / "kept").rmdir()
    assert (store.bucket / "kept" / "a").exists()
    (store.bucket / "new" / "folder").mkdir(parents=True, exist_ok=True)
    assert not (store.bucket / "new").exists()


def tensors(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((300, 4), value)}, "optim": {"state": {}}}


def test_checkpoints_count_once_complete(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    folder = store.bucket / "runs" / "c" / "checkpoints"
    with process_group(60, "cpu"):
        first = save_load.save(folder, 1, tensors(1.0), {"step": 1}, keep=2)
        assert files.step_of(first) == 1 and save_load.save(folder, 1, tensors(9.0), {}, keep=2) == first
        for name in (r"__0_0.distcp", r"\.metadata", "state.json", "manifest.json", "manifest.sha256"):
            store.faults(("PUTPOST", name, "error:403:ExpiredToken", 1000))
            with pytest.raises(CheckpointError, match=r"credentials have expired.*older checkpoints are"):
                save_load.save(folder, 2, tensors(2.0), {"step": 2}, keep=2)
            store.faults()
            assert save_load.find(folder).path == first
            assert [path.name for path in folder.iterdir()] == [first.name]
        for step in (2, 3):
            newest = save_load.save(folder, step, tensors(float(step)), {"step": step}, keep=2)
        assert [files.step_of(path) for path in files.checkpoints(folder)] == [3, 2]
        # A store that does not answer says nothing about a checkpoint: no older one is taken for it.
        for name in ("manifest.json", "__0_0.distcp", "state.json"):
            store.faults(("GETHEAD", f"step-00000003.*{name}", "error:500:InternalError", 1000))
            with pytest.raises(OSError, match="the store failed, again"):
                save_load.find(folder)
        store.faults()
        # Half of a deletion is no checkpoint.
        (newest / DIGEST).unlink()
        found = save_load.find(folder)
        assert found.path is not None and found.state["step"] == 2 and not found.refused
        assert objects.unfinished(folder, DIGEST, 60) == []
        assert [path.name for path in objects.unfinished(folder, DIGEST, -60)] == [newest.name]
        monkeypatch.setattr(files, "unfinished", partial(objects.unfinished, seconds=-60))
        files.prepare(folder, files.new_part(folder, 4))
        assert {path.name for path in folder.iterdir()} == {found.path.name}
        loaded = tensors(0.0)
        save_load.load_tensors(found.path, loaded)
        assert torch.equal(loaded["model"]["w"], tensors(2.0)["model"]["w"])
        store.seen()
        rows = TensorReader(found.path).rows("w", 10, 12)
        assert torch.equal(rows, torch.full((2, 4), 2.0))
        # One that was damaged is refused, and an older one taken.
        (found.path / files.STATE).write_bytes(b"{}")
        with pytest.raises(CheckpointError, match="no checkpoint verifies"):
            save_load.find(folder)


def test_a_spool_uploads_what_grew(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = store.bucket / "runs" / "s" / "metrics.jsonl"
    target.write_bytes(b"1\n")
    spool = Spool()
    local, board = spool.file(target), spool.folder(target.with_name("tensorboard"))
    assert local.read_bytes() == b"1\n" and not spool.due
    with local.open("a") as file:
        file.write("2\n")
    (board / "events").write_bytes(b"e")
    spool.keep()
    assert target.read_bytes() == b"1\n2\n" and (target.parent / "tensorboard" / "events").exists()
    store.seen()
    spool.keep()
    assert not store.seen()
    with local.open("a") as file:
        file.write("3\n")
    store.faults(("PUT", "metrics", "error:403:ExpiredToken", 1000))
    spool.offer()
    assert "not uploaded, and tried again: the credentials have expired" in capsys.readouterr().err
    with pytest.raises(OSError, match="expired"):
        spool.keep()
    store.faults()
    spool.close()
    assert target.read_bytes() == b"1\n2\n3\n" and not local.exists()


def test_a_save_whose_metrics_fail_says_how_to_go_on(store: Store) -> None:
    folder = RunFolder(store.bucket / "runs" / "lines")
    with process_group(60, "cpu"), MetricsLog(folder, -1) as log:
        log.write(1, "train", {"loss": 0.5})
        store.faults(("PUT", "metrics", "error:403:ExpiredToken", 1000))
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: .*expired.*the same command goes on"):
            log.keep()
        log.keep(lenient=True)
        store.faults()
    assert '"loss": 0.5' in folder.metrics.read_text()


def test_of_two_trainings_in_a_folder_the_older_gives_way(store: Store) -> None:
    path = store.bucket / "runs" / "two"
    older, newer = RunFolder(path), RunFolder(path)
    with process_group(60, "cpu"), older.lock(), MetricsLog(older, -1) as log:
        log.write(1, "train", {"loss": 0.5})
        log.keep()
        with newer.lock():
            newer.metrics.write_text("those of the newer one\n")
            log.write(2, "train", {"loss": 0.4})
            with pytest.raises(ConfigError, match=r"another training began .*process \d+.*other goes on"):
                log.keep()
            with pytest.raises(ConfigError):
                log.keep(lenient=True)
            newer.check_newest()
            # Nor are its lines uploaded at a point in time, or at the end.
            log._spool._next = 0  # type: ignore[union-attr]
            log.write(3, "train", {"loss": 0.3})
    assert newer.metrics.read_text() == "those of the newer one\n"


def test_fetched_files_are_verified_and_kept(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainer.storage.fetched import drop_old, fetch

    folder = store.bucket / "fetched"
    (folder / "t" / "a").write_bytes(b"abc")
    digest = file_digest(folder / "t" / "a")
    fetch(folder, {"t/a": (3, digest)}, tmp_path / "v1", SnapshotError)
    store.seen()
    fetch(folder, {"t/a": (3, digest)}, tmp_path / "v1", SnapshotError)
    assert not store.seen() and (tmp_path / "v1" / "t" / "a").read_bytes() == b"abc"
    # One that was damaged meanwhile, in the same size.
    (tmp_path / "v1" / "t" / "a").write_bytes(b"abd")
    assert not fetch(folder, {"t/a": (3, digest)}, tmp_path / "v1", SnapshotError)
    for again in (True, False):
        assert fetch(folder, {"t/a": (3, digest)}, tmp_path / "v1", SnapshotError, check=True) == again
    assert (tmp_path / "v1" / "t" / "a").read_bytes() == b"abc"
    assert capsys.readouterr().err.count("v1/t/a: was damaged since it was fetched") == 1
    with pytest.raises(SnapshotError, match=r"s3://.*does not match"):
        fetch(folder, {"t/a": (3, "0" * 64)}, tmp_path / "v2", SnapshotError)
    assert not list((tmp_path / "v2" / "t").iterdir())
    os.utime(tmp_path / "v1", (0, 0))
    drop_old(tmp_path, {"v2"})
    assert not (tmp_path / "v1").exists()
    shutil.rmtree(tmp_path / "v2")
