"""Raw values instead of ids: vocabularies of a log or a snapshot, found exactly, and wrong ones refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipelines.export_version as export_module
import trainer.log.known_values as vocabulary_module
from embeddings.errors import DataError, SnapshotError
from tests.helpers.logs import random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.serving import ARROW, bodies, published, service_of, serving, snapshot_of, stream
from trainer.log.known_values import KnownValues
from trainer.log.schema import read_manifest
from trainer.log.vocabulary import read_values
from trainer.log.writer import write_manifest
from trainer.serving.vocabulary import vocabularies_of
from trainer.snapshot import Snapshot, load_snapshot
from trainer.snapshot.vocabularies import copy_vocabularies

ROWS = random_rows(7)
# Text of which numbers would merge some, and integers that are not their ids.
ITEMS = ["", "0", "01", "1", "a", "aa", "ä", "item 8", *(f"x{n}" for n in range(51))]
CATEGORIES = [-5, 2, 30, 31, 32, 40, 41, 2**62]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with vocabularies as ingest writes them."""
    path = write_log(tmp_path_factory.mktemp("raw") / "log", {"train": ROWS})
    manifest = read_manifest(path)
    features = dict(manifest.features)
    for name, values in (("item_id", ITEMS), ("category_id", CATEGORIES)):
        table = pa.table({"value": values, "id": range(1, len(values) + 1), "count": [1] * len(values)})
        pq.write_table(table, path / "vocab" / f"{name}.parquet")
        digest = hashlib.sha256("".join(f"{value}\n" for value in values).encode()).hexdigest()
        features[name] = features[name].model_copy(update={"vocabulary": digest})
    write_manifest(path, manifest.model_copy(update={"features": features}))
    return path


@pytest.fixture
def snapshot(log: Path) -> Snapshot:
    """Its manifest has the digests of the log."""
    found = snapshot_of(preset("dare", log))
    digests = {name: info.vocabulary for name, info in read_manifest(log).features.items()}
    return replace(found, manifest=replace(found.manifest, vocabularies=digests))  # type: ignore[type-var]


def raw_of(feature: str, ids: list[int]) -> list[Any]:
    values: list[Any] = ITEMS if feature == "item_id" else CATEGORIES
    unknown: Any = "nobody" if feature == "item_id" else 99
    return [values[i - 1] if i else unknown for i in ids]


def test_raw_values_score_as_their_ids(
    log: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In JSON, as tensors, and in Arrow with text in any form; unknown ones are 0 and counted."""
    body = next(b for _, b in bodies(read_manifest(log), ROWS) if len(b["history"]["timestamp"]) > 20)
    raw = json.loads(json.dumps(body))
    for part in (raw["history"]["features"], raw["candidates"]):
        for name, ids in part.items():
            part[name] = raw_of(name, ids)
    unknown = {
        f"{side}.{name}": ids.count(0)
        for side, part in (("history", body["history"]["features"]), ("candidates", body["candidates"]))
        for name, ids in part.items()
        if 0 in ids
    }
    assert unknown
    row = {"request_timestamp": body["time"], "history_timestamp": body["history"]["timestamp"]}
    for side, part in (("history", raw["history"]["features"]), ("candidate", raw["candidates"])):
        row |= {f"{side}_{name}": values for name, values in part.items()}

    kinds = {str: "BYTES", int: "INT64"}

    async def run() -> None:
        service = service_of(snapshot, monkeypatch)
        service.versions.scorer.vocabularies = vocabularies_of(snapshot, log)
        async with serving(service) as client:
            assert (await client.http.get("/healthz")).json()["raw"] == ["category_id", "item_id"]
            (expected,) = (await client.score(body))["results"]
            (found,) = (await client.score(raw, ids="raw"))["results"]
            assert found["scores"] == expected["scores"] and found["unknown"] == unknown
            assert found["items"] == raw["candidates"]["item_id"]
            assert await client.metric("tandemrec_unknown_values_total") == sum(unknown.values())
            plain = pa.Table.from_pylist([row]).replace_schema_metadata({"ids": "raw"})
            items = plain["candidate_item_id"].combine_chunks()
            offsets = items.offsets
            for values in (
                items.values,
                items.values.cast(pa.string_view()),
                items.values.dictionary_encode(),
            ):
                at = plain.column_names.index("candidate_item_id")
                table = plain.set_column(at, "candidate_item_id", pa.ListArray.from_arrays(offsets, values))
                headers = {"content-type": ARROW, "accept": ARROW}
                answer = await client.http.post("/score", content=stream(table), headers=headers)
                read = pa.ipc.open_stream(answer.content).read_all()
                assert read["score_click"][0].as_py() == pytest.approx(expected["scores"]["click"], abs=1e-7)
                assert read["unknown"].to_pylist() == [sum(unknown.values())]
            tensors = {name: each if isinstance(each, list) else [each] for name, each in row.items()}
            inputs = [
                {"name": name, "shape": [len(each)], "datatype": kinds[type(each[0])], "data": each}
                for name, each in tensors.items()
            ]
            sent = {"inputs": inputs, "parameters": {"ids": "raw"}}
            answer = await client.http.post("/v2/models/tandemrec/infer", json=sent)
            outputs = {each["name"]: each["data"] for each in answer.json()["outputs"]}
            assert outputs["score_click"] == pytest.approx(expected["scores"]["click"], abs=1e-7)
            assert outputs["unknown"] == [sum(unknown.values())]
            for wrong, ids, message in (
                (raw, "dense", "history.features.item_id: holds text, and dense ids are integers"),
                (
                    {**raw, "candidates": {**raw["candidates"], "item_id": [1, 2]}},
                    "raw",
                    'its values are text: send "1", not 1',
                ),
            ):
                answer = await client.http.post("/score", json={"requests": [wrong], "ids": ids})
                assert answer.status_code == 422 and message in answer.json()["error"]
            service.versions.scorer.vocabularies = {}
            answer = await client.http.post("/score", json={"requests": [raw], "ids": "raw"})
            assert answer.status_code == 422 and "no vocabulary" in answer.json()["error"]

    asyncio.run(run())


def test_wrong_and_damaged_vocabularies_are_refused(log: Path, snapshot: Snapshot, tmp_path: Path) -> None:
    digest = snapshot.manifest.vocabularies["item_id"]
    file = tmp_path / "item_id.parquet"
    for values, ids, message in (
        ([*ITEMS[:-1], "x51"], range(1, 60), "not the vocabulary that the model was trained with"),
        (ITEMS[:-1], range(1, 59), "not the vocabulary that the model was trained with"),
        (ITEMS, range(59), "do not count from 1"),
    ):
        pq.write_table(pa.table({"value": values, "id": ids}), file)
        with pytest.raises(DataError, match=message):
            read_values(file, digest)
    file.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="unreadable"):
        read_values(file, digest)
    with pytest.raises(DataError, match="missing"):
        read_values(tmp_path / "nowhere", digest)
    (entry,) = copy_vocabularies(tmp_path, {"item_id": log / "vocab" / "item_id.parquet"})
    assert read_values(tmp_path / entry.path, digest).to_pylist() == ITEMS


@given(st.lists(st.text(max_size=6), unique=True, max_size=40), st.lists(st.text(max_size=6), max_size=20))
def test_text_is_found_exactly(values: list[str], asked: list[str]) -> None:
    known = KnownValues.of(pa.array(values, pa.large_string()))
    asked = asked + values[::2]
    expected = [values.index(text) + 1 if text in values else 0 for text in asked]
    assert known.ids(pa.array(asked, pa.large_string())).tolist() == expected


def test_texts_of_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        vocabulary_module, "_hash", lambda content, offsets: np.zeros(len(offsets) - 1, dtype=np.uint64)
    )
    known = KnownValues.of(pa.array(["a", "b", "c"], pa.large_string()))
    assert known.ids(pa.array(["c", "z", "b", "a"], pa.large_string())).tolist() == [3, 0, 2, 1]


def test_a_snapshot_carries_small_vocabularies(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are files of the version as others: listed, checked, and enough to serve raw values."""
    config = preset("dare", log)
    assert not published(config, tmp_path / "none", False).joinpath("vocab").exists()
    version = published(config, tmp_path / "small", None)
    known = vocabularies_of(load_snapshot(version), None)
    assert known["item_id"].values.to_pylist() == ITEMS
    assert known["category_id"].ids(pa.array([2**62, 3, -5])).tolist() == [8, 0, 1]
    listed = load_snapshot(version).manifest.vocabulary_files
    assert {entry.feature for entry in listed} == {"item_id", "category_id"}
    monkeypatch.setattr(export_module, "SMALL", 100)
    assert not published(config, tmp_path / "large", None).joinpath("vocab").exists()
    assert "vocabularies of 0 MB are left out; --vocabularies adds them" in capsys.readouterr().out
    assert published(config, tmp_path / "wanted", True).joinpath("vocab").exists()
    file = version / listed[0].path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(SnapshotError, match="does not match the manifest"):
        load_snapshot(version)
