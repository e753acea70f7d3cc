"""A snapshot with large tables of random rows, and a server that is started on it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embeddings.errors import TandemError
from embeddings.groups import TableGroup
from embeddings.lookup.plain import PlainBagCollection
from embeddings.lookup.stored import Dtype
from trainer.assemble import build_model, feature_rows
from trainer.config.tasks import resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.run_config import Config
from trainer.run_folder import versions
from trainer.snapshot.manifest import InputFeature, SnapshotManifest
from trainer.snapshot.publishing import drafting, publish
from trainer.snapshot.writing import Draft, finish

_ROOT = Path(__file__).parents[2]
# Rows that are written at once; every band holds the same random rows.
_BAND = 1 << 18


@dataclass(frozen=True)
class RandomSource:
    """Random tables that stand in for a checkpoint (`trainer.snapshot.writing.Source`)."""

    config: Config
    groups: Mapping[str, TableGroup]

    def dense(self) -> dict[str, Tensor]:
        collections = {}
        for name, group in self.groups.items():
            empty = {group.table_name(table): torch.empty(0) for table in group.tables}
            collections[name] = PlainBagCollection(group, empty)
        tasks = resolve_tasks({}, ["click"])
        return dict(build_model(self.config, self.groups, collections, tasks).state_dict())

    def rows(self, group: str, table: str) -> Iterator[tuple[int, Tensor]]:
        of_group = self.groups[group]
        (spec,) = (spec for spec in of_group.tables if of_group.table_name(spec) == table)
        band = torch.randn(_BAND, spec.dim) * 0.1
        for first in range(0, spec.rows, _BAND):
            yield first, band[: spec.rows - first]


def measure_start(
    config: Config, groups: Mapping[str, TableGroup], batch: RequestBatch, dtype: Dtype
) -> dict[str, Any]:
    """Write a snapshot with all tables in one type, start a server on it, and stop it again."""
    with tempfile.TemporaryDirectory() as folder:
        version = write_snapshot(Path(folder), RandomSource(config, groups), batch, dtype)
        size = sum(file.stat().st_size for file in version.rglob("*.safetensors"))
        return {"name": f"start, {dtype}", "dtype": dtype, "snapshot_mb": size / 1e6, **_start(version)}


def write_snapshot(root: Path, source: RandomSource, batch: RequestBatch, dtype: Dtype) -> Path:
    """Publish a version with a source's tables; `batch` holds the requests that it records."""
    config, groups, dense = source.config, source.groups, source.dense()
    with drafting(root) as part:
        draft = Draft(part, source, dict.fromkeys(groups, dtype))  # type: ignore[arg-type]
        draft.write_dense(dense)
        features = tuple(batch.features.keys())
        manifest = SnapshotManifest(
            number=1,
            step=0,
            score_bound=0.2,
            mean_bound=0.01,
            tasks=("click",),
            numeric=(),
            features=feature_rows(groups),
            inputs={name: InputFeature(side="both", multi=False) for name in features},
            recorded_features=features,
            recorded_context=(),
            vocabularies=dict.fromkeys(features, ""),
            groups=draft.write_tables(),
            search=draft.write_search(dense),
            config=config,
            files=(),
            versions=versions(),
        )
        # There is no trainer to compare with: the snapshot's own scores, once known, stand for its.
        own = finish(draft, manifest, batch, torch.zeros(batch.candidates, 1)).recorded.own
        manifest = finish(draft, manifest, batch, own).manifest
        return publish(root, part, manifest, keep=0)


def _start(version: Path) -> dict[str, float]:
    """Seconds from the command to listening, of the wall and of the processor; memory once it listens."""
    command = [sys.executable, "-m", "launch.cli", "serve", "--snapshot", str(version), "--port", "0"]
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        line = server.stdout.readline()
        seconds = time.perf_counter() - started
        if "serving" not in line:
            server.kill()
            raise TandemError(f"the server did not start: {line}{server.stderr.read()[-300:]}")
        found = {"start_s": seconds, **_used(server.pid)}
        server.terminate()
    return found


def _used(pid: int) -> dict[str, float]:
    """Processor seconds of a process, its resident memory, and its private part of that, in MB."""
    process = Path("/proc") / str(pid)
    ticks = (process / "stat").read_text().rpartition(")")[2].split()
    memory = _fields((process / "status").read_text().splitlines())
    return {
        "start_cpu_s": (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK"),
        "resident_mb": memory["VmRSS"] / 1000,
        "private_mb": memory["RssAnon"] / 1000,
    }


def _fields(lines: Sequence[str]) -> dict[str, int]:
    """Kilobytes by name."""
    pairs = [line.split() for line in lines if line.endswith(" kB")]
    return {name.rstrip(":"): int(value) for name, value, _ in pairs}
