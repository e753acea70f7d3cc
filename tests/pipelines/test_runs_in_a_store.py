"""Logs, runs, snapshots and raw tables in an object store: the same bits as in folders, whatever fails."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from embeddings.errors import CheckpointError
from pipelines.evaluate import evaluate
from pipelines.export import export
from pipelines.ingest.ingest import ingest
from tests.helpers.launching import SETTINGS, overrides, started, tandemrec
from tests.helpers.logs import small_log
from tests.helpers.object_store import KEY, SECRET, TOKEN, Store
from tests.helpers.rawlogs import config as ingest_config
from tests.helpers.rawlogs import events, write
from trainer.checkpoint import files
from trainer.checkpoint.tensors import TensorReader
from trainer.checkpoint.warm_start import unshard_run
from trainer.quality import evaluate as quality
from trainer.sealed_folder import DIGEST, MANIFEST
from trainer.serving.versions import Versions
from trainer.storage import objects
from trainer.storage.objects import sizes

pytest.importorskip("s3fs", reason="needs requirements/s3.txt")
pytest.importorskip("moto", reason="needs requirements/dev.txt")
MORE: dict[str, Any] = {"train.epochs": 2, "checkpoint.every_steps": 3, "checkpoint.full_every": 2}
Folders = tuple[Path, Path]


@pytest.fixture(scope="module")
def logs(server: Store, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The same log in a folder and in the store."""
    local = small_log(tmp_path_factory.mktemp("logs") / "log", users=24)
    remote = server.bucket / "logs" / "log"
    objects.publish(local, remote, (MANIFEST, DIGEST))
    return local, remote


@pytest.fixture(scope="module")
def run(logs: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder, never interrupted."""
    out = tmp_path_factory.mktemp("runs") / "run"
    done = tandemrec(*words(logs[0], out))
    assert done.returncode == 0, done.stderr
    return out


def words(log: Path, out: Path) -> list[str]:
    given = overrides({"data.log": str(log), **SETTINGS, **MORE})
    return ["train", "--config", "configs/dare.toml", "--out", str(out), *given]


def weights(run: Path) -> dict[str, torch.Tensor]:
    reader = TensorReader(files.checkpoints(run / "checkpoints")[0])
    return {name: reader.whole(f"model.{name}") for name in reader.names()}


def same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys() and len(mine) > 5
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("samples_per_s", "samples_per_cpu_s", "step_ms", "data_ms", "wall_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def test_a_run_that_is_killed_while_it_saves_goes_on_with_the_same_bits(
    store: Store, logs: Folders, run: Path
) -> None:
    out = store.bucket / "runs" / "killed"
    # Faults that pass on the way, and no answer to the manifest of the second save.
    store.faults(
        ("GET", "part-0000", "error:500:InternalError", 2, 1),
        ("GET", "part-0000", "truncated", 1, 3),
        ("PUT", "__0_0.distcp", "error:503:SlowDown", 1),
        ("PUT", "metrics.jsonl", "reset", 1),
        ("PUT", r"step-00000006-\w+/manifest.json", "hold", 1000),
    )
    with started(*words(logs[1], out)) as (process, _, err):
        end, asked = time.monotonic() + 90, False
        while not asked and process.is_alive() and time.monotonic() < end:
            time.sleep(0.1)
            asked = any("step-00000006" in path and "manifest.json" in path for _, path, *_ in store.seen())
        assert asked, err.read_text()
        process.kill()
        process.join()
    store.faults()
    half = {name for name in sizes(out / "checkpoints") if name.startswith("step-00000006")}
    assert half and not any(name.endswith(DIGEST) for name in half)
    assert [files.step_of(path) for path in files.checkpoints(out / "checkpoints")] == [3]
    done = tandemrec(*words(logs[1], out))
    assert done.returncode == 0, done.stderr
    assert "resumed from s3://tandem-tests/runs/killed/checkpoints/step-00000003-" in done.stdout
    assert "refused" not in done.stdout and "keeps no locks" in done.stderr
    same_weights(run, out)
    assert metrics(run) == metrics(out)
    # What the killed save left is in nobody's way, and not old enough to be deleted.
    assert half <= set(sizes(out / "checkpoints"))
    assert {"config.toml", "summary.json", "metrics.jsonl"} <= set(sizes(out))
    assert len([name for name in sizes(out) if name.startswith("tensorboard/")]) == 2


def test_a_save_that_fails_is_one_error_and_loses_nothing(store: Store, logs: Folders, run: Path) -> None:
    out = store.bucket / "runs" / "denied"
    store.faults(("PUTPOST", "step-00000006", "error:403:ExpiredToken", 1000))
    done = tandemrec(*words(logs[1], out), ranks=2)
    assert done.returncode
    lines = [each.partition(": error: ")[2] for each in done.stderr.splitlines() if ": error: " in each]
    # One a rank at most.
    assert 1 <= len(lines) <= 2 and "Traceback" not in done.stderr
    for line in lines:
        assert "step-00000006-" in line and "credentials have expired; renew them" in line, lines
        assert "older checkpoints are untouched" in line
    store.faults()
    done = tandemrec(*words(logs[1], out), ranks=2)
    assert done.returncode == 0 and "step-00000003-" in done.stdout, done.stderr
    at_end = [files.step_of(path) for path in files.checkpoints(out / "checkpoints")]
    assert at_end[0] == files.step_of(files.checkpoints(run / "checkpoints")[0]) and len(at_end) >= 2
    done = tandemrec("evaluate", "--run", str(out), ranks=2)
    assert done.returncode == 0 and (out / "scores-test.parquet").is_file(), done.stderr


def test_what_cannot_be_reached_is_said_before_anything_is_done(store: Store, logs: Folders) -> None:
    missing = "s3://no-such-bucket-here/x"
    for log, out, says in (
        (str(logs[1]), missing, "no such bucket"),
        (missing, str(logs[1].parent / "run"), "no such bucket"),
    ):
        done = tandemrec(*words(Path("LOG"), Path("OUT")), "--set", f"data.log={log}", "--out", out)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    store.faults(("PUT", "writable", "error:403:AccessDenied", 1000))
    done = tandemrec(*words(logs[1], store.bucket / "runs" / "forbidden"))
    assert done.returncode == 2 and "cannot be written: access denied" in done.stderr, done.stderr
    assert not sizes(store.bucket / "runs" / "forbidden")


def test_snapshots_are_published_fetched_followed_and_retired(
    store: Store, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = store.bucket / "snapshots"
    whole = export(run, root, "fp32", "fp32", parity_requests=0)
    assert whole.name == "v00000001" and (root / "LATEST").read_text() == "v00000001\n"
    versions = Versions(root, cache=tmp_path / "cache")
    assert versions.scorer.version == "v00000001" and versions.newer() is None
    assert versions.shown().startswith(f"{root}/v00000001 (fetched to {tmp_path / 'cache'}")
    # A number that somebody else has claimed is not taken, and a killed export is no version.
    assert objects.create(root / "v00000002" / "claim")
    delta = export(run, root, "fp32", "fp32", since="1", keep=1, parity_requests=0)
    assert delta.name == "v00000003" and not (delta / "claim").exists()
    assert versions.newer() is not None and versions.reload() and versions.scorer.version == "v00000003"
    versions.scorer.snapshot.self_check()
    # What a delta builds on stays; a full one frees both.
    assert (whole / DIGEST).exists()
    export(run, root, "fp32", "fp32", keep=1, parity_requests=0)
    left = {name.partition("/")[0] for name in sizes(root)}
    assert left == {"LATEST", "v00000002", "v00000004"}
    assert versions.reload()
    # One that was damaged in the cache, in the same size, is fetched again.
    file = next((tmp_path / "cache").glob("*/v00000004/dense.safetensors"))
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert Versions(root, cache=tmp_path / "cache").scorer.version == "v00000004"
    assert file.read_bytes() == content
    assert f"{file}: was damaged since it was fetched" in capsys.readouterr().err
    # Nothing but a complete version is ever named.
    store.faults(("PUT", "v00000005", "error:403:ExpiredToken", 1000, 3))
    with pytest.raises(Exception, match="credentials have expired"):
        export(run, root, "fp32", "fp32", parity_requests=0)
    store.faults()
    assert (root / "LATEST").read_text() == "v00000004\n" and versions.newer() is None
    out = store.bucket / "scores.parquet"
    local = tmp_path / "cache2"
    done = tandemrec(
        *("score", "--snapshot", str(root), "--requests", str(store.bucket / "logs" / "log")),
        *("--out", str(out), "--cache", str(local)),
    )
    assert done.returncode == 0 and out.is_file() and list(local.glob("*/v00000004")), done.stderr
    assert f"scored by {root}/v00000004 (fetched to {local}" in done.stdout


def test_tables_are_unsharded_and_started_from(store: Store, logs: Folders, run: Path) -> None:
    plain, warm = store.bucket / "plain", store.bucket / "runs" / "warm"
    done = tandemrec("unshard", "--run", str(run), "--out", str(plain))
    assert done.returncode == 0 and (plain / DIGEST).is_file(), done.stderr
    with pytest.raises(CheckpointError, match=r"is there already; name another --out$"):
        unshard_run(run, plain)
    (half := store.bucket / "half" / "tables" / "x").write_bytes(b"left of a killed upload")
    with pytest.raises(CheckpointError, match=r"is there already; .*if an upload into it was killed.*delete"):
        unshard_run(run, half.parents[1])
    done = tandemrec(*words(logs[1], warm), "--init-from", str(plain), "--set", "train.max_steps=2")
    assert done.returncode == 0 and f"weights from {plain}" in done.stdout, done.stderr


def test_ingest_from_a_store_into_a_store(store: Store, tmp_path: Path) -> None:
    raw = store.bucket / "raw"
    for day in (1, 2):
        file = write(tmp_path / f"{day}.parquet", events(seed=day))
        objects.upload(file, raw / f"day={day}" / "events.parquet")
    config = ingest_config("time-split")
    local = ingest([tmp_path / "1.parquet", tmp_path / "2.parquet"], tmp_path / "log", config)
    out = store.bucket / "logs" / "ingested"
    for given in (raw, [f"{raw}/day=1/*.parquet", f"{raw}/day=2/events.parquet"]):
        remote = ingest(given, out, config, overwrite=True)  # type: ignore[arg-type]
        assert remote.splits == local.splits
    assert sizes(out) == sizes(tmp_path / "log")
    with pytest.raises(Exception, match="no such file, or an empty folder"):
        ingest(f"{raw}/nothing/*.parquet", tmp_path / "none", config)
    with pytest.raises(Exception, match="is a sequence log already"):
        ingest(raw, out, config)
    (store.bucket / "logs" / "half" / "train" / "part-00000.parquet").write_bytes(b"left of a killed upload")
    with pytest.raises(Exception, match=r"not a sequence log.*if an upload into it was killed.*delete"):
        ingest(raw, store.bucket / "logs" / "half", config)


def test_scores_that_a_killed_evaluation_left_go_after_a_day(
    store: Store, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = store.bucket / "runs" / "left"
    objects.publish(run, out, ())
    left = [f"tandemrec-scores-{each}.tmp-0/rank-00000-00000.parquet" for each in ("old", "new")]
    for name in left:
        (out / name).write_bytes(b"rows")
    monkeypatch.setattr(quality, "IN_MEMORY", 10)
    new = re.compile(r"left/tandemrec-scores-new")
    real = objects._written

    def written(info: dict[str, Any]) -> float:
        return real(info) - (0 if new.search(info["name"]) else objects.LEFT_S)

    monkeypatch.setattr(objects, "_written", written)
    evaluate(out, "test")
    assert [name for name in sizes(out) if ".tmp-" in name] == left[1:]
    assert (out / "scores-test.parquet").is_file()


def test_no_credentials_are_in_anything_that_was_written(store: Store, logs: Folders, run: Path) -> None:
    out = store.bucket / "runs" / "secret"
    store.faults(("PUTPOST", "step-00000006", "error:403:SignatureDoesNotMatch", 1000))
    done = tandemrec("--debug", *words(logs[1], out))
    assert done.returncode == 2
    everything = {**store.objects(), "stdout": done.stdout.encode(), "stderr": done.stderr.encode()}
    assert len(everything) > 20
    for name, content in everything.items():
        for secret in (SECRET, TOKEN, KEY):
            assert secret.encode() not in content, name
