"""From an event to a served score: a planted stream whose best item becomes the worst at a known time

    tandemrec bench online freshness --config configs/dare.toml --out OUT [--users 24000] [--every 30m] \
        [--pace 5] [--set KEY=VALUE ...] [--page FILE.md] [--image FILE.svg]

`tandemrec synth --kind flip` makes the log; a model is trained on its first six days. From half a day before
the flip on, a window appears every --pace seconds, `tandemrec online` learns and publishes, and
`tandemrec serve` follows; a client asks twice a second for the scores of both stars. Event time runs as fast
as windows appear: an event in the middle of a window happened half of --pace before it appeared. All
processes share the machine.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.online.plot import line_plot
from pipelines.synth.flip import BEHAVIORS, FLIP
from pipelines.synth.log import DAY
from pipelines.windows import WINDOWS, WindowOptions, seconds_of, window_name, windows
from trainer.log.schema import read_manifest

_BEFORE = DAY // 2  # of the first window, before the flip
_PROBE_S, _START_S, _END_S = 0.5, 240.0, 180.0
_CATEGORY = 1


@dataclass(frozen=True)
class Probe:
    """One answer of the server: when, the version, the scores of both stars."""

    at: float
    version: str
    before: float
    after: float


@dataclass
class Timeline:
    """What happened when, in seconds of this machine's clock.

    Attributes:
        appeared: window -> when it appeared; requests: window -> how many it has.
        failed: why an answer failed to come; empty: all came.
    """

    appeared: dict[str, float] = field(default_factory=dict)
    requests: dict[str, int] = field(default_factory=dict)
    probes: list[Probe] = field(default_factory=list)
    failed: str = ""

    def answered(self) -> bool:
        """Whether there is any answer. Raises SystemExit where one failed to come."""
        if self.failed:
            raise SystemExit(f"a request was not answered: {self.failed}")
        return bool(self.probes)


def prepare(given: Any) -> tuple[Path, Path]:
    """The run that was trained on what lies before, and the stream, none of whose windows has appeared."""
    from pipelines.synth.synth import synth
    from pipelines.train import train

    log, stream, base = (given.out / name for name in ("log", "stream", "base"))
    synth(log, "flip", given.seed, given.users, overwrite=True)
    options = WindowOptions(seconds_of(given.every, "--every"), FLIP - _BEFORE)
    windows(log, stream, options, base, overwrite=True)
    (stream / WINDOWS).rename(stream / "later")
    (stream / WINDOWS).mkdir()
    run = given.out / "before"
    shutil.rmtree(run, ignore_errors=True)
    train(given.config, run, [*overrides_of(given), f"data.log={json.dumps(str(base.absolute()))}"])
    return run, stream


def overrides_of(given: Any) -> list[str]:
    """Settings for the planted log, and those that were given."""
    own = [f"data.history_length={BEHAVIORS}", "data.batch_candidates=256", "ids.item_id.capacity=1024"]
    return [*own, f"train.seed={given.seed}", *given.overrides]


@contextmanager
def process(log: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A verb of the command line in a process of its own, until the end of the body."""
    with log.open("wb") as file:
        command = [sys.executable, "-m", "launch.cli", *words]
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield started
        finally:
            started.terminate()
            started.wait(60)


def until(what: str, running: Sequence[subprocess.Popen[bytes]], ready: Any, seconds: float) -> None:
    """Wait for a condition.

    Raises:
        SystemExit: a process ended meanwhile, or it took too long.
    """
    end = time.monotonic() + seconds
    while not ready():
        if any(each.poll() is not None for each in running):
            raise SystemExit(f"a process ended while this waited for {what}; see the logs in --out")
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {seconds:.0f} s; see the logs in --out")
        time.sleep(0.2)


def feed(stream: Path, pace: float, line: Timeline, most: int = 0) -> None:
    """Let the windows that wait appear one by one, or so many of them."""
    files = sorted((stream / "later").iterdir())
    start = time.time()
    for number, file in enumerate(files[: most or len(files)]):
        requests = int(np.sum(pq.read_table(file, columns=["num_requests"])["num_requests"].to_numpy()))
        time.sleep(max(0.0, start + number * pace - time.time()))
        file.touch()  # it is as old as it seems
        file.rename(stream / WINDOWS / file.name)
        line.appeared[file.stem], line.requests[file.stem] = time.time(), requests


def ask(address: str, stars: tuple[int, int]) -> tuple[str, float, float]:
    """The version that serves, and the scores of both stars for one request."""
    # As strings: not every reader of JSON keeps all digits of a 64-bit integer.
    ids = [str(star) for star in stars]
    time_of = [FLIP - DAY + 3_600 * number for number in range(2)]
    request = {
        "time": FLIP + DAY,
        "history": {"timestamp": time_of, "features": {"item_id": ids, "category_id": [_CATEGORY] * 2}},
        "candidates": {"item_id": ids, "category_id": [_CATEGORY] * 2},
    }
    body = json.dumps({"requests": [request]}).encode()
    call = urllib.request.Request(f"{address}/score", body, {"content-type": "application/json"})
    with urllib.request.urlopen(call, timeout=30) as answer:
        told = json.load(answer)
    before, after = told["results"][0]["scores"]["click"]
    return str(told["version"]), float(before), float(after)


def watch(address: str, stars: tuple[int, int], line: Timeline, stop: threading.Event) -> None:
    """Ask until `stop`, or until an answer fails to come."""
    while not stop.wait(_PROBE_S):
        try:
            version, before, after = ask(address, stars)
        except OSError as error:
            line.failed = str(error)
            return
        line.probes.append(Probe(time.time(), version, before, after))


def measure(given: Any, run: Path, stream: Path, stars: tuple[int, int]) -> Timeline:
    """Feed the stream to a training and a server, and ask the server."""
    out, snapshots, line, stop = given.out, given.out / "snapshots", Timeline(), threading.Event()
    for folder in (out / "online", snapshots):
        shutil.rmtree(folder, ignore_errors=True)
    overrides = [*overrides_of(given), f"train.init_from={json.dumps(str(run.absolute()))}"]
    sets = [word for override in overrides for word in ("--set", override)]
    train = ["online", "--config", str(given.config), "--stream", str(stream), "--out", str(out / "online")]
    train += ["--snapshots", str(snapshots), "--follow", *sets]
    port = _free_port()
    serve = ["serve", "--snapshot", str(snapshots), "--port", str(port), "--set", "updates.poll_seconds=1"]
    address, newest = f"http://127.0.0.1:{port}", snapshots / "LATEST"
    feeder = threading.Thread(target=feed, args=(stream, given.pace, line), daemon=True)
    watcher = threading.Thread(target=watch, args=(address, stars, line, stop), daemon=True)
    with process(out / "online.log", *train) as trainer:
        feed(stream, 0.0, line, most=1)
        until("a first version", [trainer], newest.exists, _START_S)
        with process(out / "serve.log", *serve) as server:
            until("the server", [trainer, server], lambda: _answers(address), _START_S)
            watcher.start()
            until("a first answer", [trainer, server], line.answered, _START_S)
            feeder.start()
            feeder.join()
            last = max(line.appeared)
            until("the last window", [trainer, server], lambda: _serves(out, last, line), _END_S)
            stop.set()
            watcher.join()
    return line


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5):
            return True
    except OSError:
        return False


def _serves(out: Path, window: str, line: Timeline) -> bool:
    return line.answered() and versions_of(out).get(line.probes[-1].version, "") >= window


def versions_of(out: Path) -> dict[str, str]:
    """Version -> the newest window that it was trained on."""
    lines = (out / "online" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines if '"version"' in line]
    return {entry["version"]: entry["window"] for entry in entries if "version" in entry}


def served_at(line: Timeline, versions: Mapping[str, str]) -> dict[str, float]:
    """Window -> when a version that has learnt it first answered; those after the first answer only."""
    found: dict[str, float] = {}
    first = versions.get(line.probes[0].version, "")
    for probe in line.probes:
        newest = versions.get(probe.version, "")
        for window in line.appeared:
            if first < window <= newest:
                found.setdefault(window, probe.at)
    return found


def delays(line: Timeline, served: Mapping[str, float], pace: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Seconds from each event to the first answer that knows it; events lie evenly in their windows."""
    parts = []
    for window, at in served.items():
        count = line.requests[window]
        happened = line.appeared[window] - pace * (1 - (np.arange(count) + 0.5) / max(count, 1))
        parts.append(at - happened)
    return np.concatenate(parts)


def followed(line: Timeline, flip_at: float) -> float:
    """Seconds from the flip until the star that is best from then on stays above the other one."""
    wrong = [probe.at for probe in line.probes if probe.after <= probe.before]
    right = [probe.at for probe in line.probes if probe.at > max(wrong, default=0.0)]
    return (min(right) - flip_at) if right else float("nan")


def main(words: Sequence[str]) -> None:
    options = Options("online freshness", __doc__)
    options.add_argument("--config", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--users", type=int, default=24_000, help="requests of the first six days")
    options.add_argument("--every", default="30m", help="of a window, in event time")
    options.add_argument("--pace", type=float, default=5.0, help="seconds between two windows")
    options.add_argument("--seed", type=int, default=7)
    options.add_argument("--image", type=Path, help="an SVG of both scores")
    options.overriding()
    given = options.read(words)
    given.out.mkdir(parents=True, exist_ok=True)
    run, stream = prepare(given)
    facts = read_manifest(given.out / "log").ingest["synth"]
    stars = (int(facts["best_before"]), int(facts["best_after"]))
    line = measure(given, run, stream, stars)
    report = Report(given, "Freshness", seed=given.seed, n=len(line.appeared))
    flip_at = line.appeared[Path(window_name(FLIP)).stem] - given.pace
    _report(report, given, line, flip_at)
    if given.image:
        shown = [probe for probe in line.probes if flip_at - 30 <= probe.at]
        # A short run has several probes within a second.
        digits = 0 if shown[-1].at - shown[0].at > 20 else 1
        seconds = [f"{probe.at - flip_at:.{digits}f}" for probe in shown]
        lines = {"best before": [p.before for p in shown], "best after": [p.after for p in shown]}
        mark = (next(n for n, probe in enumerate(shown) if probe.at >= flip_at), "flip")
        title = "Served scores of the two stars"
        given.image.write_text(
            line_plot(title, "seconds from the flip", seconds, lines, mark), encoding="utf-8"
        )
    report.close()


def _report(report: Report, given: Any, line: Timeline, flip_at: float) -> None:
    versions = versions_of(given.out)
    served = served_at(line, versions)
    waited = delays(line, served, given.pace)
    p50, p95 = (float(np.percentile(waited, q)) for q in (50, 95))
    seconds = followed(line, flip_at)
    after = [w for w, at in line.appeared.items() if flip_at < at <= flip_at + seconds]
    row = {
        "windows": len(served),
        "events": waited.size,
        "versions": len({probe.version for probe in line.probes}),
        "answers": len(line.probes),
        "p50": p50,
        "p95": p95,
        "most": float(waited.max()),
        "followed": seconds,
        "events_after": sum(line.requests[window] for window in after),
    }
    report.rows = [row]
    report.table(
        {
            "windows": "{windows:,}",
            "requests in them": "{events:,}",
            "versions served": "{versions:,}",
            "answers": "{answers:,}",
            "event to served score, p50 s": "{p50:.1f}",
            "p95 s": "{p95:.1f}",
            "most s": "{most:.1f}",
            "flip to scores that follow, s": "{followed:.1f}",
            "requests meanwhile": "{events_after:,}",
        },
        report.rows,
    )
