"""Several tasks at the server: names are those of tasks, and so are the labels that the page is told."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.helpers.logs import Shape, enrich, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.serving import bodies, service_of, serving, snapshot_of
from trainer.log.schema import read_manifest

ROWS = enrich(random_rows(4, Shape(users=6)), 5)
TASKS = (
    "tasks.clicked.label=click",
    "tasks.conversion.label=buy",
    "tasks.conversion.mask=click == 1",
    "tasks.both.label=buy",
)


def test_names_and_labels_are_those_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A label that a task did not observe is null: neither 0 nor NaN, which JSON does not have."""
    log = write_log(tmp_path / "log", {"train": ROWS}, rich=True)
    snapshot = snapshot_of(preset("dare", log, *TASKS))
    (_, body), *_ = bodies(read_manifest(log), ROWS)

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, log)) as client:
            (result,) = (await client.score(body))["results"]
            assert list(result["scores"]) == ["clicked", "conversion", "both"]
            assert (await client.http.get("/healthz")).json()["tasks"] == ["clicked", "conversion", "both"]
            unknown = 0
            for row in ROWS:
                answer = await client.http.get(f"/users/{row['user_id']}")
                assert answer.status_code == 200
                for r, request in enumerate(answer.json()["requests"]):
                    click, buy = row["label_click"][r], row["label_buy"][r]
                    masked = [label if c == 1 else None for label, c in zip(buy, click, strict=True)]
                    assert request["labels"] == {"clicked": click, "conversion": masked, "both": buy}
                    unknown += masked.count(None)
            assert unknown > 10

    asyncio.run(run())
