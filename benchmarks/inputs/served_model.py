"""A model that is served under load: snapshots with random tables, and bodies of requests drawn for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.inputs.random_snapshot import RandomSource, write_snapshot
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.plain import PlainBagCollection
from trainer.assemble import build_model
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.log.bags import Bags
from trainer.run_config import Config
from trainer.sealed_folder import DIGEST, MANIFEST
from trainer.serving.arrow_body import MEDIA_TYPE
from trainer.serving.request import History, Request
from trainer.serving.scorer import Scorer
from trainer.snapshot import Snapshot
from trainer.snapshot.manifest import InputFeature
from trainer.snapshot.publishing import drafting, publish
from trainer.snapshot.reading import read_manifest

FEATURE = "item_id"
JSON = "application/json"
_NOW = 10**9
# Of a version, what is said by whoever publishes it.
_SEALS = shutil.ignore_patterns(MANIFEST, DIGEST)


@dataclass(frozen=True)
class ServedModel:
    """A model like that of `configs/dare.toml`, with one feature and without time.

    Attributes:
        rows: of both tables; attention, representation: their widths; k: behaviors kept.
        length: the most behaviors that it reads.
    """

    rows: int = 200_000
    attention: int = 16
    representation: int = 64
    k: int = 50
    length: int = 10_000

    def config(self) -> Config:
        """Both tables are read by candidates and behaviors."""
        roles = {
            f"{stage}_{side}": stage
            for stage in ("attention", "representation")
            for side in ("target", "behavior")
        }
        return Config.model_validate(
            {
                "data": {"history_length": self.length},
                "model": {"k": self.k, "position": False, "age": False, "search": "dot", "roles": roles},
                "groups": {name: {"dim": dim} for name, dim in self._dims().items()},
            }
        )

    def groups(self) -> dict[str, TableGroup]:
        return {n: TableGroup(n, (TableSpec(FEATURE, self.rows, dim),)) for n, dim in self._dims().items()}

    def publish(self, root: Path, seed: int) -> Path:
        """Publish a version whose tables and dense part follow from a seed."""
        torch.manual_seed(seed)
        source = RandomSource(self.config(), self.groups())
        return write_snapshot(root, source, self._recorded(), "fp32")

    def _dims(self) -> dict[str, int]:
        return {"attention": self.attention, "representation": self.representation}

    def _recorded(self) -> RequestBatch:
        """The requests that a snapshot records. What a batch is like follows from the manifest alone."""
        config, groups = self.config(), self.groups()
        tables = {}
        for name, group in groups.items():
            weights = {group.table_name(table): torch.zeros(table.rows, 1) for table in group.tables}
            tables[name] = PlainBagCollection(group, weights)
        model = build_model(config, groups, tables, resolve_tasks({}, ["click"])).eval()
        facts: dict[str, Any] = {
            "config": config, "features": {FEATURE: self.rows}, "step": 0, "tasks": ("click",), "numeric": (),
            "inputs": {FEATURE: InputFeature(side="both", multi=False)}, "recorded_features": (FEATURE,),
            "recorded_context": (), "vectors": {}, "ids": {},
        }  # fmt: skip
        recorded = SimpleNamespace(batch=SimpleNamespace(request_time=torch.zeros(0)))
        snapshot = Snapshot(Path("random"), SimpleNamespace(**facts), model, recorded)  # type: ignore[arg-type]
        return Scorer(snapshot).batch([draw(self, 0, min(self.length, 200), 20)])


def draw(model: ServedModel, seed: int, length: int, candidates: int) -> Request:
    """A user's history and candidates; the same seed draws the same ones."""
    rng = np.random.default_rng([seed, length, candidates])
    times = np.sort(rng.integers(0, _NOW, length))
    history = History(times, {FEATURE: Bags(rng.integers(0, model.rows, length))})
    ids = Bags(rng.integers(0, model.rows, candidates))
    return Request(0, history, _NOW, {FEATURE: ids}, candidates, {}, {})


def json_body(request: Request, more: int = 1) -> bytes:
    """A body with the request, `more` times."""
    history, ids = request.history, request.history.features[FEATURE].values
    row = {"timestamp": history.time.tolist(), "features": {FEATURE: ids.tolist()}}
    candidates = {FEATURE: request.candidates[FEATURE].values.tolist()}
    each = {"history": row, "time": request.time, "candidates": candidates}
    return json.dumps({"requests": [each] * more}).encode()


def arrow_body(request: Request) -> bytes:
    """The same body in Arrow."""
    lists = {
        "history_timestamp": request.history.time,
        f"history_{FEATURE}": request.history.features[FEATURE].values,
        f"candidate_{FEATURE}": request.candidates[FEATURE].values,
    }
    columns = {name: pa.array([values], pa.list_(pa.int64())) for name, values in lists.items()}
    table = pa.table({"request_timestamp": [request.time], **columns})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def content_types() -> dict[str, str]:
    """Of the forms of a body."""
    return {"json": JSON, "arrow": MEDIA_TYPE}


def publish_again(root: Path, version: Path, keep: int = 0) -> Path:
    """Publish a whole version under the next number of another folder of versions."""
    with drafting(root) as part:
        shutil.copytree(version, part, dirs_exist_ok=True, ignore=_SEALS)
        return publish(root, part, read_manifest(version), keep)
