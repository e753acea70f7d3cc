"""The server under load, beside a bare FastAPI scorer and ONNX Runtime over the same weights

Closed loops with 1, 8 and 32 connections find what each server can do. Open loops then ask at a constant
rate of 50, 80 and 120 % of that, and latencies count from the intended moment. All servers and the client are
processes of their own, on this machine; the client's share of a core and how late it sends stand beside its
figures. A round of a row is short, and the servers' rounds follow each other, so that what else the machine
does meets all of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from benchmarks.harness.report import Report, Row
from benchmarks.inputs.served_model import ServedModel
from benchmarks.serve.bodies import write_bodies
from benchmarks.serve.measure import Load, measured
from benchmarks.serve.servers import BARE, ONNX, OURS, SCORER, check_alike, start_servers
from trainer.config.toml import Settings

# Whom we are compared with -> what its ratios are called.
RIVALS = {BARE: "bare", ONNX: "onnx", SCORER: "scorer"}
# Connections of an open loop, at most.
_OPEN = 256
_NAMES = ("rate", "p50_ms", "p99_ms", "p999_ms", "cpu_ms", "client_cores", "late_ms")
_MEMORY = ("resident_mb", "private_mb")
COLUMNS = {
    "server and body": "{name}", "connections": "{connections}", "asked/s": "{asked_rate:.0f}",
    "answered/s": "{rate:.1f}", "p50 ms": "{p50_ms:.2f}", "p99 ms": "{p99_ms:.2f}",
    "p99.9 ms": "{p999_ms:.2f}", "errors": "{errors}", "CPU ms": "{cpu_ms:.2f}",
    "client cores": "{client_cores:.2f}", "late p99 ms": "{late_ms:.2f}",
}  # fmt: skip
# Above 1: ours does more.
RATIOS = {
    "body": "{body}", "connections": "{connections}",
    "rate to plain torch": "{rate_bare:.2f}", "to ONNX Runtime": "{rate_onnx:.2f}",
    "to our scorer": "{rate_scorer:.2f}", "least": "{rate_scorer_min:.2f}", "most": "{rate_scorer_max:.2f}",
    "CPU to plain torch": "{cpu_ms_bare:.2f}", "CPU to ONNX Runtime": "{cpu_ms_onnx:.2f}",
    "CPU to our scorer": "{cpu_ms_scorer:.2f}",
}  # fmt: skip
_SERVERS = {
    "server": "{name}", "start s": "{start_s:.1f}", "resident MB": "{resident_mb:.0f}",
    "private MB": "{private_mb:.0f}", "threads": "{threads}",
}  # fmt: skip


class LoadBench(Settings):
    """The load.

    Attributes:
        rows: of both tables; attention, representation: their widths; k: behaviors kept.
        small, large: behaviors and candidates of a request.
        connections: of closed loops; shares: of the capacity, of open ones.
        seconds, open_seconds: of one round; open_rounds: of a row of open loops, --repeats of the others.
    """

    rows: PositiveInt = 200_000
    attention: PositiveInt = 16
    representation: PositiveInt = 64
    k: PositiveInt = 50
    small: tuple[NonNegativeInt, PositiveInt] = (200, 20)
    large: tuple[NonNegativeInt, PositiveInt] = (10_000, 500)
    connections: tuple[PositiveInt, ...] = (1, 8, 32)
    shares: tuple[PositiveFloat, ...] = (0.5, 0.8, 1.2)
    seconds: PositiveFloat = 1.5
    open_seconds: PositiveFloat = 3.0
    open_rounds: PositiveInt = 2

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """By the name of the body."""
        return {"small": self.small, "large": self.large}

    def model(self) -> ServedModel:
        """What is served."""
        longest = max(length for length, _ in self.shapes.values())
        return ServedModel(self.rows, self.attention, self.representation, self.k, longest)


class Bench:
    """The servers, the bodies, and the rows so far.

    Attributes:
        rows: of the table of loads; compared: what we do over what others do.
    """

    def __init__(self, settings: LoadBench, folder: Path, repeats: int, held: ExitStack) -> None:
        self.settings, self.folder, self.repeats = settings, folder, repeats
        self.model = settings.model()
        self.rows: list[Row] = []
        self.compared: list[Row] = []
        self._capacity: dict[tuple[str, str], float] = {}
        self.servers = start_servers(self.model, folder, held)
        for shape in settings.shapes.values():
            check_alike(self.servers, self.model, shape)

    def bodies(self, shape: str, form: str) -> Path:
        """A folder of bodies, made when it is first asked for."""
        folder = self.folder / "bodies" / f"{shape}-{form}"
        if not folder.exists():
            write_bodies(folder, self.model, form, self.settings.shapes[shape], range(8))
        return folder

    def closed_loops(self) -> None:
        """All servers at each number of connections: small and large bodies in JSON."""
        for shape in self.settings.shapes:
            for connections in self.settings.connections:
                load = Load("json", (self.bodies(shape, "json"),), connections)
                loads = {(name, f"{name}, {shape}"): load for name in self.servers}
                found = self._rounds(loads, self.repeats, self.settings.seconds)
                for (name, _), rows in found.items():
                    rate = statistics.median(row["rate"] for row in rows)
                    self._capacity[name, shape] = max(self._capacity.get((name, shape), 0.0), rate)
                self._compare(shape, connections, {name: rows for (name, _), rows in found.items()})

    def open_loops(self) -> None:
        """At shares of what each server can do."""
        for shape in self.settings.shapes:
            for share in self.settings.shares:
                bodies, loads = (self.bodies(shape, "json"),), {}
                for name in (OURS, BARE, ONNX):
                    told = f"{name}, {shape}, {share:.0%} of its capacity"
                    loads[name, told] = Load("json", bodies, _OPEN, share * self._capacity[name, shape])
                self._rounds(loads, self.settings.open_rounds, self.settings.open_seconds)

    def forms(self) -> None:
        """The same large request in each form."""
        for connections in self.settings.connections[:2]:
            loads = {
                (OURS, f"{OURS}, large, {form}"): Load(form, (self.bodies("large", form),), connections)
                for form in ("json", "arrow", "grpc")
            }
            self._rounds(loads, self.repeats, self.settings.seconds)

    def memory(self) -> list[Row]:
        """How long each server took to start, and what it holds now."""
        found = []
        for name, server in self.servers.items():
            found.append({"name": name, "start_s": server.start_s, **server.process.memory()})
        return found

    def _rounds(
        self, loads: Mapping[tuple[str, str], Load], rounds: int, seconds: float
    ) -> dict[tuple[str, str], list[Row]]:
        """Rounds of all loads in turn, by server and what the row is called, and a row for each."""
        taken: dict[tuple[str, str], list[Row]] = {key: [] for key in loads}
        for _ in range(rounds):
            for key, load in loads.items():
                taken[key].append(measured(self.servers[key[0]].process, load, seconds))
        for key, rows in taken.items():
            self._add(key[1], loads[key], rows)
        return taken

    def _add(self, name: str, load: Load, rows: Sequence[Row]) -> None:
        """One row of the table: medians over the rounds."""
        row: Row = {key: statistics.median(each[key] for each in rows) for key in _NAMES}
        kinds = [kind for each in rows for kind in each["error_kinds"].items()]
        row |= {"name": name, "connections": load.connections, "n": len(rows), "error_kinds": kinds}
        row["errors"] = sum(each["errors"] for each in rows)
        if load.rate is not None:
            row |= {"asked_rate": load.rate, "connections": "open"}
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def _compare(self, shape: str, connections: int, found: Mapping[str, Sequence[Row]]) -> None:
        """What we do over what others do: answers a second, and answers for one processor second.

        Ratios are of two rounds that followed each other, and of these the medians.
        """
        row: Row = {"body": shape, "connections": connections}
        for rival, short in RIVALS.items():
            for key, over, under in (("rate", OURS, rival), ("cpu_ms", rival, OURS)):
                pairs = zip(found[over], found[under], strict=True)
                ratios = [a[key] / b[key] for a, b in pairs]
                name = f"{key}_{short}"
                row |= {
                    name: statistics.median(ratios),
                    f"{name}_min": min(ratios),
                    f"{name}_max": max(ratios),
                }
        self.compared.append(row)


def measure_load(settings: LoadBench, repeats: int, report: Report) -> None:
    """All loads."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        bench = Bench(settings, Path(folder), repeats, held)
        bench.closed_loops()
        bench.open_loops()
        bench.forms()
        memory: list[dict[str, Any]] = bench.memory()
    for row in bench.compared:
        for rival in RIVALS.values():
            for key in ("rate", "cpu_ms"):
                report.ratios[f"{key}_to_{rival}_{row['body']}_{row['connections']}"] = row[f"{key}_{rival}"]
    shown = {
        "Answers of our server for one of another, a second and a processor second:": (
            RATIOS,
            bench.compared,
        ),
        "Under load:": (COLUMNS, bench.rows),
        "Servers: their starts, and what they hold after it all:": (_SERVERS, memory),
    }
    for heading, (columns, rows) in shown.items():
        report.line(heading)
        report.table(columns, rows)
        report.line()
        report.rows += rows
