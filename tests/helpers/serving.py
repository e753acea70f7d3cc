"""Snapshots without training, requests from rows of a log, and a server in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

import trainer.serving.versions as versions_module
from pipelines.export_version import copy_wanted_vocabularies, inputs_of
from pipelines.serve.app import build_app
from pipelines.serve.metrics import Metrics
from pipelines.serve.service import Service
from pipelines.serve.settings import load_serve_settings
from pipelines.serve.tokens import Token
from tests.helpers.logs import Row
from tests.helpers.models import drawing, model_of
from trainer.assemble import feature_rows, resolve_groups
from trainer.config.tasks import names_of, resolve_tasks
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import LogManifest, read_manifest
from trainer.run_config import Config
from trainer.run_folder import versions
from trainer.serving.histories import HistoryStore
from trainer.serving.json_body import RequestBody
from trainer.serving.request import Limits
from trainer.serving.versions import Versions
from trainer.snapshot import Snapshot
from trainer.snapshot.loading import RecordedRequests
from trainer.snapshot.manifest import InputFeature, SnapshotIds, SnapshotManifest, VocabularyFile
from trainer.snapshot.publishing import drafting, publish
from trainer.snapshot.vector_entries import SnapshotVectors
from trainer.snapshot.writing import Draft, Source, finish

ARROW = "application/vnd.apache.arrow.stream"
TOKEN = "a token for the tests"


class OneToken(Token):
    """TOKEN, without a file."""

    def __init__(self) -> None: ...

    def is_in(self, authorization: str) -> bool:
        return authorization == f"Bearer {TOKEN}"


@dataclass(frozen=True)
class Described:
    """Of a snapshot's manifest what serving looks at."""

    config: Config
    features: dict[str, int]
    recorded_features: tuple[str, ...]
    recorded_context: tuple[str, ...]
    tasks: tuple[str, ...]
    numeric: tuple[str, ...]
    vocabularies: dict[str, str]
    inputs: dict[str, InputFeature]
    vocabulary_files: tuple[VocabularyFile, ...] = ()
    ids: dict[str, SnapshotIds] = field(default_factory=dict)
    vectors: dict[str, SnapshotVectors] = field(default_factory=dict)
    step: int = 7
    exported_at: int | None = None
    score_bound: float = 1e-6
    mean_bound: float = 1e-6


def rows_of(config: Config) -> dict[str, int]:
    return feature_rows(resolve_groups(config, read_manifest(config.data.log)))


def snapshot_of(config: Config, path: Path = Path("snapshot/v00000001")) -> Snapshot:
    """A model with first weights over plain tables, and its first batch as recorded requests."""
    manifest, rows = read_manifest(config.data.log), rows_of(config)
    model = model_of(config).eval().requires_grad_(False)
    tasks = resolve_tasks(config.tasks, manifest.tasks)
    batch = next(iter(SequenceLogReader(config.data, "train", rows, tasks=tasks).steps())).batch
    described = Described(
        config,
        rows,
        tuple(batch.features.keys()),
        tuple(batch.context.keys()) if batch.context is not None else (),
        tuple(names_of(tasks)),
        tuple(manifest.numeric),
        {},
        inputs_of(manifest, batch),
    )
    scores = model(batch).logits.sigmoid()
    recorded = RecordedRequests(batch, scores, scores)
    return Snapshot(path, described, model, recorded)  # type: ignore[arg-type]


def published(config: Config, root: Path, vocabularies: bool | None = False) -> Path:
    """The version of a snapshot with random tables, which nobody trained."""
    log, plain = read_manifest(config.data.log), snapshot_of(config)
    source = _Untrained(config, resolve_groups(config, log), None)  # type: ignore[arg-type]
    manifest, batch = plain.manifest, plain.recorded.batch
    known = {**log.features, **log.context}
    digests = {name: known[name].vocabulary for name in manifest.inputs}
    with drafting(root) as part:
        draft = Draft(part, source, dict.fromkeys(source.groups, "fp32"))  # type: ignore[arg-type]
        dense = source.dense()
        draft.write_dense(dense)
        described = SnapshotManifest(
            number=1,
            step=0,
            score_bound=0.2,
            mean_bound=0.01,
            tasks=manifest.tasks,
            numeric=manifest.numeric,
            features=manifest.features,
            inputs=manifest.inputs,
            recorded_features=manifest.recorded_features,
            recorded_context=manifest.recorded_context,
            vocabularies=digests,
            vocabulary_files=copy_wanted_vocabularies(
                part, config.data.log, manifest.inputs, digests, vocabularies
            ),
            groups=draft.write_tables(),
            search=draft.write_search(dense),
            config=config,
            files=(),
            versions=versions(),
        )
        # Its own scores stand for the trainer's.
        nothing = torch.zeros(batch.candidates, len(manifest.tasks))
        own = finish(draft, described, batch, nothing).recorded.own
        return publish(root, part, finish(draft, described, batch, own).manifest, keep=0)


class _Untrained(Source):
    """First weights of a model, and random tables."""

    def dense(self) -> dict[str, torch.Tensor]:
        state = model_of(self.config).state_dict()
        return {name: part for name, part in state.items() if not name.startswith("collections.")}

    def rows(self, group: str, table: str) -> Iterator[tuple[int, torch.Tensor]]:
        of_group = self.groups[group]
        (spec,) = (spec for spec in of_group.tables if of_group.table_name(spec) == table)
        yield 0, torch.randn(spec.rows, spec.dim, generator=drawing(spec.rows)) * 0.5


def bodies(manifest: LogManifest, rows: Sequence[Row]) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Every request of the rows as ((user, request), what a client sends): the whole history each time."""
    found = []
    for row in rows:
        history: dict[str, Any] = {
            "timestamp": row["history_timestamp"],
            "features": {n: row[f"history_{n}"] for n, i in manifest.features.items() if i.of_behaviors},
        }
        if manifest.clusters:
            history |= {name: row[name] for name in ("cluster_size", "cluster_time")}
        for r, request in enumerate(row["request_id"]):
            body = {
                "user_id": row["user_id"],
                "history": history,
                "time": row["request_timestamp"][r],
                "candidates": {
                    n: row[f"candidate_{n}"][r] for n, i in manifest.features.items() if i.of_candidates
                },
                "context": {n: row[f"context_{n}"][r] for n in manifest.context},
                "numeric": {n: row[f"numeric_{n}"][r] for n in manifest.numeric},
            }
            found.append(((row["user_id"], request), body))
    return found


def model_body(body: dict[str, Any]) -> RequestBody:
    return RequestBody.model_validate(body)


def reference(snapshot: Snapshot, split: str = "train") -> dict[tuple[int, int], np.ndarray]:
    """(user, request) -> probabilities [c, T], read from the log and scored by the model as it is."""
    config = snapshot.manifest.config
    found = {}
    for step in SequenceLogReader(config.data, split, rows_of(config)).steps():
        batch = step.batch
        scores = snapshot.score(batch)
        for r, name in enumerate(zip(batch.user_id.tolist(), batch.request_id.tolist(), strict=True)):
            found[name] = scores[batch.candidate_request == r].numpy()
    return found


class Client:
    """Calls the app without a socket; an exception inside is an answer 500, as with a socket."""

    def __init__(self, service: Service, http: httpx.AsyncClient) -> None:
        self.service, self.http = service, http

    async def score(self, *requests: dict[str, Any], **more: Any) -> dict[str, Any]:
        answer = await self.http.post("/score", json={"requests": list(requests), **more})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def reload(self) -> httpx.Response:
        """Ask for the newest version, with the token."""
        return await self.http.post("/reload", headers={"authorization": f"Bearer {TOKEN}"})

    async def metric(self, name: str) -> float:
        text = (await self.http.get("/metrics")).text
        lines = [line.rpartition(" ") for line in text.splitlines()]
        return float(next(value for key, _, value in lines if key == name))


def stream(table: pa.Table, rows: int | None = None, **options: Any) -> bytes:
    """A table as an Arrow IPC stream, in batches of so many rows; `options` of how it is written."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return sink.getvalue().to_pybytes()


def service_of(
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    log: Path | None = None,
    poll: float = 0.0,
    **settings: Any,
) -> Service:
    """A service of a snapshot that lies in memory only; `settings` by their keys: `limits__body=20_000`."""
    monkeypatch.setattr(versions_module, "load_fetched", lambda path, cache: snapshot)
    monkeypatch.setattr(versions_module, "resolve", lambda path: snapshot.path)
    metrics = Metrics()
    store = None if log is None else HistoryStore(log)
    words = [f"{name.replace('__', '.')}={value}" for name, value in settings.items()]
    chosen = load_serve_settings(None, [f"updates.poll_seconds={poll}", *words])
    versions = Versions(
        snapshot.path,
        store,
        lambda outcome: metrics.reloads.labels(outcome).inc(),
        user_states=chosen.user_states,
    )
    service = Service(versions, metrics, chosen)
    service.reload_token = OneToken()
    return service


def set_limits(service: Service, limits: Limits) -> None:
    """Other limits from now on."""
    service.core.settings = replace(service.core.settings, limits=limits)


@asynccontextmanager
async def serving(service: Service) -> AsyncIterator[Client]:
    """The running app."""
    app = build_app(service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://here") as http,
    ):
        yield Client(service, http)
