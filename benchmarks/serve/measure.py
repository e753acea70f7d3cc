"""One measurement of a server: a client in a process of its own, and what both took."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.report import Row
from benchmarks.harness.server_process import ServerProcess
from benchmarks.serve.client import LoadSpec
from embeddings.errors import TandemError

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Load:
    """What a client asks for.

    Attributes:
        form: json, arrow or grpc. bodies, share, first: as in `LoadSpec`.
        connections: of a closed loop, or the most of an open one. rate: requests a second; None: closed.
    """

    form: str
    bodies: tuple[Path, ...]
    connections: int
    rate: float | None = None
    share: tuple[float, ...] = (1.0,)
    first: int = 0


def measured(server: ServerProcess, load: Load, seconds: float) -> Row:
    """The figures of one load.

    Raises:
        TandemError: the client failed, or all requests did.
    """
    port = server.port
    if load.form == "grpc":
        assert server.grpc is not None
        port = int(server.grpc.rpartition(":")[2])
    spec = LoadSpec(
        kind="grpc" if load.form == "grpc" else "http",
        port=port,
        bodies=list(load.bodies),
        share=list(load.share),
        first=load.first,
        connections=load.connections,
        rate=load.rate,
        seconds=seconds,
    )
    before = server.cpu_seconds()
    found = _client(spec)
    cpu = server.cpu_seconds() - before
    return _row(found, cpu)


def _client(spec: LoadSpec) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "load.json"
        file.write_text(spec.model_dump_json())
        command = [sys.executable, "-m", "benchmarks.serve.client", str(file)]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TandemError(f"the client failed: {done.stderr[-1000:]}")
        found: dict[str, Any] = json.loads(file.with_suffix(".found").read_text())
        return found


def _row(found: dict[str, Any], cpu: float) -> Row:
    latencies = 1e3 * np.array(found["latencies"])
    if not latencies.size:
        raise TandemError(f"no request was answered: {found['outcomes']}")
    p50, p99, p999 = np.quantile(latencies, [0.5, 0.99, 0.999]).tolist()
    outcomes = found["outcomes"]
    asked = sum(outcomes.values())
    return {
        "rate": latencies.size / found["seconds"],
        "p50_ms": p50,
        "p99_ms": p99,
        "p999_ms": p999,
        "errors": asked - latencies.size,
        "error_kinds": {kind: count for kind, count in outcomes.items() if kind != "200"},
        "asked": asked,
        # Answers that do not count took processor seconds too.
        "cpu_ms": 1e3 * cpu / found["answered"],
        "client_cores": found["client_cores"],
        "late_ms": 1e3 * float(np.quantile(found["late"], 0.99)) if found["late"] else 0.0,
    }
