"""Scores that are no numbers: whose fault it is, and what the server says and does."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.models import preset
from tests.helpers.served import ROWS
from tests.helpers.serving import bodies, service_of, serving, snapshot_of
from trainer.log.schema import read_manifest
from trainer.snapshot import Snapshot

Patch = pytest.MonkeyPatch
Body = dict[str, Any]


@pytest.fixture
def snapshot(log: Path) -> Snapshot:
    """A test may spoil it."""
    return snapshot_of(preset("dare", log))


@pytest.fixture
def fine(log: Path) -> Body:
    found = [b for _, b in bodies(read_manifest(log), ROWS) if len(b["history"]["timestamp"]) > 8]
    copy: Body = json.loads(json.dumps(found[0]))
    return copy


@pytest.mark.parametrize("role", ["attention", "representation"])
def test_a_table_that_was_overwritten_is_named_and_its_answers_refused(
    snapshot: Snapshot, monkeypatch: Patch, fine: Body, role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Requests that do not read the rows are scored on; the server is not ready, and tells once why."""
    other = json.loads(json.dumps(fine))
    row = fine["candidates"]["item_id"][0]
    for part in (other["candidates"], other["history"]["features"]):
        part["item_id"] = [1 if item == row else item for item in part["item_id"]]

    async def run() -> None:
        service = service_of(snapshot, monkeypatch)
        async with serving(service) as client:
            before = await client.score(other)
            names = dict(snapshot.model.named_parameters())
            table = next(names[name] for name in names if role in name and "item_id" in name)
            table.data[row] = torch.nan
            for _ in range(2):
                answer = await client.http.post("/score", json={"requests": [other, fine]})
                assert answer.status_code == 503 and "v00000001 answers with what is no" in answer.text
            assert await client.score(other) == before
            ready = await client.http.get("/readyz")
            assert ready.status_code == 503 and f"{role}/item_id hold NaN" in ready.text
            problem = f"rows of the table {role}/item_id hold NaN or infinity"
            said = f"not ready: the version v00000001 answers with what is no number: {problem}\n"
            assert capsys.readouterr().out.count(said) == 1
            assert await client.metric('tandemrec_lost_total{why="unsound"}') == 2

    asyncio.run(run())


def test_dense_weights_that_were_overwritten_are_found_by_the_recorded_requests(
    snapshot: Snapshot, monkeypatch: Patch, fine: Body
) -> None:
    async def run() -> None:
        service = service_of(snapshot, monkeypatch)
        async with serving(service) as client:
            next(snapshot.model.head.parameters()).fill_(torch.nan)
            answer = await client.http.post("/score", json={"requests": [fine]})
            assert answer.status_code == 503 and "recorded candidates score otherwise" in answer.text
            assert (await client.http.get("/readyz")).status_code == 503

    asyncio.run(run())


def test_large_numbers_of_a_request_leave_its_scores_numbers(
    snapshot: Snapshot, monkeypatch: Patch, fine: Body
) -> None:
    """No client can make a sound server look broken."""
    fine["numeric"]["price"] = [(-1) ** n * 3e38 for n in range(len(fine["candidates"]["item_id"]))]

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            scores = (await client.score(fine))["results"][0]["scores"]["click"]
            assert all(0 <= score <= 1 for score in scores)
            assert (await client.http.get("/readyz")).status_code == 200

    asyncio.run(run())
