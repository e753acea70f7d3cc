"""The server under load, beside a bare FastAPI scorer and ONNX Runtime over the same weights

Closed loops with 1, 8 and 32 connections find what each server can do. Open loops then ask at a constant
rate of 50, 80 and 120 % of that, and latencies count from the intended moment. Further rows: JSON, Arrow and
gRPC, and users whose states are known for 0, 50 and 90 % of the requests. All servers and the client are
processes of their own, on this machine; the client's share of a core and how late it sends stand beside its
figures. `CPU ms` are the server's processor seconds for one request, which other work on the machine disturbs
less. --config is a TOML of `LoadBench`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.server_process import ServerProcess, serve_command, served
from benchmarks.inputs.served_model import JSON, ServedModel, draw, json_body
from benchmarks.load.bodies import write_bodies
from benchmarks.load.measure import Load, measured
from embeddings.errors import TandemError
from trainer.config.toml import Settings, load_settings

OURS, STATES = "tandemrec", "tandemrec, states"
BARE, ONNX, SCORER = "bare FastAPI", "bare FastAPI, ONNX Runtime", "bare FastAPI, our scorer"
# Whom we are compared with -> what its ratios are called.
RIVALS = {BARE: "bare", ONNX: "onnx", SCORER: "scorer"}
_NAMES = ("rate", "p50_ms", "p99_ms", "p999_ms", "cpu_ms", "client_cores", "late_ms")
COLUMNS = {
    "server and body": "{name}", "connections": "{connections}", "asked/s": "{asked_rate:.0f}",
    "answered/s": "{rate:.1f}", "p50 ms": "{p50_ms:.2f}", "p99 ms": "{p99_ms:.2f}",
    "p99.9 ms": "{p999_ms:.2f}", "errors": "{errors}", "CPU ms": "{cpu_ms:.2f}",
    "client cores": "{client_cores:.2f}", "late p99 ms": "{late_ms:.2f}",
    "known": "{measured_hits:.2f}",
}  # fmt: skip
# Above 1: ours does more.
RATIOS = {
    "body": "{body}", "connections": "{connections}",
    "rate to bare FastAPI with plain torch": "{rate_bare:.2f}", "with ONNX Runtime": "{rate_onnx:.2f}",
    "with our scorer": "{rate_scorer:.2f}",
    "answers per CPU s to plain torch": "{cpu_ms_bare:.2f}", "to ONNX Runtime": "{cpu_ms_onnx:.2f}",
    "to our scorer": "{cpu_ms_scorer:.2f}",
}  # fmt: skip


class LoadBench(Settings):
    """The settings of this benchmark.

    Attributes:
        rows: of both tables; attention, representation: their widths; k: behaviors kept.
        small, large: behaviors and candidates of a request.
        connections: of closed loops; shares: of the capacity, of open ones.
        seconds, open_seconds: of one measurement.
        hits: shares of requests whose user's state is known; users: number of these users; strangers: of the
            others, more than the server keeps states of.
        state_bytes: for them.
    """

    rows: PositiveInt = 200_000
    attention: PositiveInt = 16
    representation: PositiveInt = 64
    k: PositiveInt = 50
    small: tuple[NonNegativeInt, PositiveInt] = (200, 20)
    large: tuple[NonNegativeInt, PositiveInt] = (10_000, 500)
    connections: tuple[PositiveInt, ...] = (1, 8, 32)
    shares: tuple[PositiveFloat, ...] = (0.5, 0.8, 1.2)
    seconds: PositiveFloat = 2.0
    open_seconds: PositiveFloat = 4.0
    hits: tuple[float, ...] = (0.0, 0.5, 0.9)
    users: PositiveInt = 8
    strangers: PositiveInt = 120
    state_bytes: PositiveInt = 192 << 20

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """By the name of the body."""
        return {"small": self.small, "large": self.large}

    def model(self) -> ServedModel:
        """What is served."""
        longest = max(length for length, _ in self.shapes.values())
        return ServedModel(self.rows, self.attention, self.representation, self.k, longest)


class Bench:
    """The servers, the bodies, and the rows so far."""

    def __init__(self, settings: LoadBench, folder: Path, report: Report, repeats: int) -> None:
        self.settings, self.folder, self.report, self.repeats = settings, folder, report, repeats
        self.model = settings.model()
        self.servers: dict[str, ServerProcess] = {}
        self.compared: list[Row] = []
        self._capacity: dict[tuple[str, str], float] = {}

    def start(self, held: ExitStack) -> None:
        """Start all servers on one snapshot, and see that they score alike."""
        version = self.model.publish(self.folder / "snapshot", 0)
        portable = self.folder / "portable"
        export = ["export", "--snapshot", str(version), "--format", "onnx", "--out", str(portable)]
        words = [sys.executable, "-m", "launch.cli", *export, "--parity-requests", "0"]
        subprocess.run(words, check=True, capture_output=True)
        rival = [sys.executable, "-m", "benchmarks.rivals.fastapi_scorer"]
        commands = {
            OURS: serve_command(version, "grpc.port=0", "user_states.bytes=0"),
            BARE: [*rival, "torch", str(version)],
            ONNX: [*rival, "onnx", str(portable)],
            SCORER: [*rival, "scorer", str(version)],
            STATES: serve_command(version, f"user_states.bytes={self.settings.state_bytes}"),
        }
        # One thread each: threads of OpenMP would else wait actively beside those of the others.
        environment = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        for number, (name, command) in enumerate(commands.items()):
            said = self.folder / f"said-{number}"
            self.servers[name] = held.enter_context(served(command, said, environment))
        self._check()

    def bodies(self, shape: str, form: str, seeds: Sequence[int] = range(8)) -> Path:
        """A folder of bodies, made when it is first asked for."""
        folder = self.folder / "bodies" / f"{shape}-{form}-{seeds[0]}-{len(seeds)}"
        if not folder.exists():
            write_bodies(folder, self.model, form, self.settings.shapes[shape], seeds)
        return folder

    def closed_loops(self) -> None:
        """All servers, in turn, at each number of connections: small and large bodies in JSON."""
        for shape in self.settings.shapes:
            for connections in self.settings.connections:
                load = Load("json", (self.bodies(shape, "json"),), connections)
                found = self._rounds({name: load for name in (OURS, *RIVALS)}, self.settings.seconds)
                for name, rows in found.items():
                    self._add(f"{name}, {shape}", load, rows)
                    rate = statistics.median(row["rate"] for row in rows)
                    key = name, shape
                    self._capacity[key] = max(self._capacity.get(key, 0.0), rate)
                self._compare(shape, connections, found)

    def open_loops(self) -> None:
        """At shares of what each server can do."""
        for shape in self.settings.shapes:
            for share in self.settings.shares:
                for name in (OURS, BARE, ONNX):
                    rate = share * self._capacity[name, shape]
                    load = Load("json", (self.bodies(shape, "json"),), 256, rate)
                    row = measured(self.servers[name], load, self.settings.open_seconds)
                    self._add(f"{name}, {shape}, {share:.0%} of its capacity", load, [row])

    def forms(self) -> None:
        """The same large request in each form."""
        for connections in self.settings.connections[:2]:
            loads = {
                form: Load(form, (self.bodies("large", form),), connections)
                for form in ("json", "arrow", "grpc")
            }
            taken: dict[str, list[Row]] = {form: [] for form in loads}
            for _ in range(self.repeats):
                for form, load in loads.items():
                    taken[form].append(measured(self.servers[OURS], load, self.settings.seconds))
            for form, rows in taken.items():
                self._add(f"{OURS}, large, {form}", loads[form], rows)

    def known_users(self) -> None:
        """Large requests in Arrow, of users whose states are known to the server or not."""
        settings = self.settings
        known = self.bodies("large", "arrow", range(1000, 1000 + settings.users))
        strangers = self.bodies("large", "arrow", range(2000, 2000 + settings.strangers))
        met = 0
        for connections in settings.connections[:2]:
            for hit in settings.hits:
                load = Load("arrow", (known, strangers), connections, share=(hit, 1 - hit))
                before, rows = self._outcomes(), list[Row]()
                for _ in range(self.repeats):
                    # Strangers who came a moment ago are known for a while.
                    rows.append(measured(self.servers[STATES], replace(load, first=met), settings.seconds))
                    met += rows[-1]["asked"]
                gained = {name: count - before.get(name, 0) for name, count in self._outcomes().items()}
                share = gained.get("hit", 0) / max(sum(gained.values()), 1)
                self._add(f"{STATES} of {hit:.0%}, large, arrow", load, rows, measured_hits=share)
        health = httpx.get(f"http://127.0.0.1:{self.servers[STATES].port}/healthz").json()
        self.report.facts["user_states"] = health["user_states"]

    def _rounds(self, loads: Mapping[str, Load], seconds: float) -> dict[str, list[Row]]:
        taken: dict[str, list[Row]] = {name: [] for name in loads}
        for _ in range(self.repeats):
            for name, load in loads.items():
                taken[name].append(measured(self.servers[name], load, seconds))
        return taken

    def _add(self, name: str, load: Load, rows: Sequence[Row], **more: Any) -> None:
        """One row of the report: medians over the rounds."""
        row: Row = {key: statistics.median(each[key] for each in rows) for key in _NAMES}
        kinds = [kind for each in rows for kind in each["error_kinds"].items()]
        row |= {"name": name, "connections": load.connections, "n": len(rows), "error_kinds": kinds, **more}
        row["errors"] = sum(each["errors"] for each in rows)
        if load.rate is not None:
            row |= {"asked_rate": load.rate, "connections": "open"}
        self.report.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def _compare(self, shape: str, connections: int, found: Mapping[str, Sequence[Row]]) -> None:
        """What we do over what others do: answers a second, and answers for one processor second."""
        row: Row = {"body": shape, "connections": connections}
        for rival, short in RIVALS.items():
            for key, over, under in (("rate", OURS, rival), ("cpu_ms", rival, OURS)):
                pairs = zip(found[over], found[under], strict=True)
                ratio = statistics.median(a[key] / b[key] for a, b in pairs)
                row[f"{key}_{short}"] = ratio
                self.report.ratios[f"{key}_to_{short}_{shape}_{connections}"] = ratio
        self.compared.append(row)

    def _outcomes(self) -> dict[str, float]:
        """What the server has known of users so far."""
        text = httpx.get(f"http://127.0.0.1:{self.servers[STATES].port}/metrics").text
        prefix = 'tandemrec_user_states_total{outcome="'
        lines = [line.removeprefix(prefix) for line in text.splitlines() if line.startswith(prefix)]
        return {name: float(count) for name, _, count in (line.partition('"} ') for line in lines)}

    def _check(self) -> None:
        """Raises TandemError where two servers score the same bodies otherwise."""
        for shape in self.settings.shapes.values():
            body = json_body(draw(self.model, 0, *shape))
            scores = {}
            for name, server in self.servers.items():
                url = f"http://127.0.0.1:{server.port}/score"
                answer = httpx.post(url, content=body, headers={"content-type": JSON}, timeout=60)
                answer.raise_for_status()
                scores[name] = np.array(answer.json()["results"][0]["scores"]["click"])
            for name, each in scores.items():
                far = float(np.abs(each - scores[OURS]).max())
                if not far <= 1e-4:
                    raise TandemError(f"{name} scores otherwise, by {far:.3g}: it is no baseline")


def main(words: Sequence[str]) -> None:
    given = Options("load", __doc__).measuring(config=False, repeats=3).read(words)
    settings = load_settings(LoadBench, given.config, given.overrides)
    report = Report(given, "Load", seed=0)
    report.facts = settings.model_dump(mode="json")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as held:
        bench = Bench(settings, Path(folder), report, given.repeats)
        bench.start(held)
        bench.closed_loops()
        bench.open_loops()
        bench.forms()
        bench.known_users()
        report.table(RATIOS, bench.compared)
    report.table(COLUMNS, report.rows)
    report.close()
