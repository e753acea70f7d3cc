"""Versions that one process publishes one after the other, compared on requests that are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from embeddings.errors import DataError
from pipelines.export import report_lines
from pipelines.export_version import ExportOptions, publish_version
from tests.helpers.logs import small_log
from tests.helpers.snapshots import save_run
from trainer.log.schema import LogManifest, read_manifest
from trainer.ranks.process_group import process_group
from trainer.snapshot import load_snapshot

OPTIONS = ExportOptions("fp32", "fp32", parity_requests=5)


def window_of(manifest: LogManifest, split: str) -> LogManifest:
    """The files of a split under another name, as those of a window of a stream."""
    return manifest.model_copy(update={"splits": {"window": manifest.splits[split]}})


def test_one_process_publishes_version_after_version(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    manifest = read_manifest(log)
    out, run = tmp_path / "out", tmp_path / "run"
    save_run(run, log)
    with process_group(device="cpu") as ranks:
        first = publish_version(run, out, ranks, OPTIONS, window_of(manifest, "test"))
        second = publish_version(run, out, ranks, ExportOptions("fp32", "fp32", since="1", parity_requests=5))
    assert [version.path.name for version in (first, second)] == ["v00000001", "v00000002"]
    assert [version.manifest.number for version in (first, second)] == [1, 2]
    assert (first.split, second.split) == ("window", "validation")
    assert first.parity.requests == 5 and "5 window requests" in report_lines(first)[-2]
    recorded = [set(load_snapshot(v.path).recorded.batch.user_id.tolist()) for v in (first, second)]
    assert not recorded[0] & recorded[1], "each has requests of its own split"
    assert load_snapshot(second.path).manifest.base is not None


def test_without_requests_there_is_nothing_to_compare(tmp_path: Path) -> None:
    log = small_log(tmp_path / "log")
    run, empty = save_run(tmp_path / "run", log), read_manifest(log).model_copy(update={"splits": {}})
    with process_group(device="cpu") as ranks, pytest.raises(DataError, match="no request to compare"):
        publish_version(run, tmp_path / "out", ranks, OPTIONS, empty)
    assert not (tmp_path / "out").exists()
