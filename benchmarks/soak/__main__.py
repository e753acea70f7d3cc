"""Hours of serving while the snapshot is swapped every minute: memory, and what became of every request

    tandemrec bench soak --minutes 120 --json soak.json --page soak.md

A server in a process of its own; steady clients at a constant rate, a tenth of them new users, the others
users whose histories grow; clients that leave before the answer or in the middle of a body; slow ones; bodies
that are no good; and a version that is published every minute. Two contents take turns, so that scores say
whether an answer is of the version that it names. The JSON file is written every minute. SIGTERM and SIGINT
end the soak early, with its report. --config is a TOML of `SoakBench`. It fails where a request has no right
answer, or the server no clean end.
"""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.server_process import ServerProcess, serve_command, served
from benchmarks.inputs.served_model import ServedModel, publish_again
from benchmarks.soak.accounts import Accounts
from benchmarks.soak.bodies import bad_requests, known_users, new_users
from benchmarks.soak.memory import memory_of
from benchmarks.soak.slope import slope_of
from benchmarks.soak.traffic import Traffic
from embeddings.errors import TandemError
from trainer.config.toml import Settings, load_settings
from trainer.sealed_folder import write_text

_SAMPLE_S = 5.0
# Of the whole time, what does not count for the slope: caches fill meanwhile.
_WARM, _LONGEST_WARM = 0.2, 600.0
# What a line is laid through, and how it is called.
_SIZES = {
    "resident_mb": "resident",
    "private_mb": "private to the process",
    "heap_used_mb": "in use of the C library's heaps",
    "heap_free_mb": "free in these heaps, in memory or given back",
}


class SoakBench(Settings):
    """The settings of this benchmark.

    Attributes:
        minutes: how long it takes; --minutes says the same.
        rate: requests a second of the steady clients; swap_seconds: between two versions.
        rows: of both tables; length: the most behaviors of a history.
        users, visits: of the users that come again; seed: of all that is drawn.
        server: further settings of the server, as KEY=VALUE.
    """

    minutes: PositiveFloat = 120.0
    rate: PositiveFloat = 10.0
    swap_seconds: PositiveFloat = 60.0
    rows: PositiveInt = 200_000
    length: PositiveInt = 10_000
    users: PositiveInt = 16
    visits: PositiveInt = 6
    seed: NonNegativeInt = 17
    server: tuple[str, ...] = ()


@dataclass
class Soak:
    """What is under way.

    Attributes:
        samples: of the server's memory, with the seconds since the start.
        swaps: versions published after the first.
    """

    settings: SoakBench
    root: Path
    accounts: Accounts = field(default_factory=Accounts)
    samples: list[dict[str, float]] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    swaps: int = 0
    seconds: float = 0.0
    ended: tuple[int, float] | None = None

    def publish(self, version: Path, content: int) -> None:
        """Publish a version; the one before it stays, whoever reads it."""
        # An answer may name the version before this call returns.
        upcoming = f"v{len(self.accounts.contents) + 1:08d}"
        self.accounts.contents[upcoming] = content
        published = publish_again(self.root, version, keep=2)
        assert published.name == upcoming

    def facts(self) -> dict[str, Any]:
        """What was found so far."""
        accounts = self.accounts
        answered = accounts.count("answered")
        quantiles = np.quantile(self.latencies or [float("nan")], [0.5, 0.99, 0.999])
        return {
            **self.settings.model_dump(),
            "seconds": self.seconds,
            "swaps": self.swaps,
            "versions_published": len(accounts.contents),
            "versions_seen": len(accounts.versions),
            "answered": answered,
            "lost": accounts.count("lost"),
            "lost_first": accounts.lost,
            **dict(zip(("p50_ms", "p99_ms", "p999_ms"), (1e3 * quantiles).tolist(), strict=True)),
            "ended": self.ended,
            "slopes": {name: asdict(self._slope(name)) for name in _SIZES},
        }

    def rows(self) -> list[Row]:
        """What became of the requests of each kind."""
        return [
            {"name": f"{kind}: {outcome}", "requests": count}
            for (kind, outcome), count in sorted(self.accounts.outcomes.items())
        ]

    def _slope(self, name: str) -> Any:
        warm = min(_WARM * self.seconds, _LONGEST_WARM)
        known = [each for each in self.samples if name in each]
        times, values = ([each[key] for each in known] for key in ("seconds", name))
        return slope_of(times, values, self.settings.swap_seconds, warm)


def main(words: Sequence[str]) -> None:
    options = Options("soak", __doc__)
    options.add_argument("--minutes", type=float, help="how long it takes")
    options.add_argument("--config", type=Path, metavar="FILE", help="TOML configuration")
    options.overriding()
    given = options.read(words)
    chosen = [*given.overrides, *([] if given.minutes is None else [f"minutes={given.minutes}"])]
    settings = load_settings(SoakBench, given.config, chosen)
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(settings, Path(folder) / "snapshot")
        model = ServedModel(rows=settings.rows, length=settings.length)
        contents = [model.publish(Path(folder) / f"content-{seed}", seed) for seed in (0, 1)]
        soak.publish(contents[0], 0)
        command = serve_command(soak.root, "updates.poll_seconds=0.5", *settings.server)
        with served(command, Path(folder) / "said", {"PYTHONUNBUFFERED": "1"}) as server:
            asyncio.run(_run(soak, server, model, contents, given.json))
            soak.ended = server.end(60)
        said = (Path(folder) / "said").read_text(errors="replace").splitlines()
    _report(soak, Report(given, "Soak", seed=settings.seed, n=1), said)


async def _run(
    soak: Soak, server: ServerProcess, model: ServedModel, contents: Sequence[Path], kept: Path | None
) -> None:
    """All clients, and what goes on beside them, until the time is over."""
    settings = soak.settings
    known = known_users(model, settings.users, settings.visits)
    new = new_users(model, 1_000_000)
    traffic = Traffic((server.host, server.port), soak.accounts, known, new, bad_requests(), settings.seed)
    soak.latencies = traffic.latencies
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, traffic.stopped.set)
    beside = [
        asyncio.create_task(_swap(soak, contents, traffic.stopped)),
        asyncio.create_task(_watch(soak, server, traffic.stopped, kept)),
    ]
    await asyncio.gather(traffic.run(settings.rate), *beside)


async def _swap(soak: Soak, contents: Sequence[Path], stopped: asyncio.Event) -> None:
    """Publish a version again and again, its content in turn."""
    while not await _waited(stopped, soak.settings.swap_seconds):
        content = len(soak.accounts.contents) % len(contents)
        await asyncio.to_thread(soak.publish, contents[content], content)
        soak.swaps += 1


async def _watch(soak: Soak, server: ServerProcess, stopped: asyncio.Event, kept: Path | None) -> None:
    """Note the server's memory; stop when the time is over, or the server is gone."""
    started, told = time.monotonic(), 0.0
    while not stopped.is_set():
        soak.seconds = time.monotonic() - started
        if server.process.poll() is not None:
            soak.accounts.lose("server", f"has ended with {server.process.returncode}")
            stopped.set()
            return
        soak.samples.append({"seconds": soak.seconds, **await memory_of(server)})
        if soak.seconds - told >= 60 and kept is not None:
            told = soak.seconds
            tree = {"facts": soak.facts(), "rows": soak.rows(), "samples": soak.samples}
            write_text(kept, json.dumps(tree, indent=1))
        if soak.seconds >= 60 * soak.settings.minutes:
            stopped.set()
        await _waited(stopped, _SAMPLE_S)


async def _waited(stopped: asyncio.Event, seconds: float) -> bool:
    """Wait so long; whether it was stopped."""
    try:
        async with asyncio.timeout(seconds):
            await stopped.wait()
    except TimeoutError:
        return False
    return True


def _report(soak: Soak, report: Report, said: Sequence[str]) -> None:
    """Tell what was found.

    Raises:
        TandemError: a request has no right answer, or the server no clean end.
    """
    facts = soak.facts()
    report.facts = {**facts, "samples": soak.samples}
    report.rows = soak.rows()
    report.table({"requests": "{name}", "number": "{requests:,}"}, report.rows)
    report.line(
        f"{soak.seconds / 60:.1f} minutes; {soak.swaps} swaps; {facts['versions_seen']} of "
        f"{facts['versions_published']} versions seen in answers; {facts['lost']} requests lost"
    )
    report.line("steady clients, from the intended moment: " + _latency(facts))
    for name, slope in facts["slopes"].items():
        report.line(
            f"{_SIZES[name]}: {slope['mb_per_hour']:+.1f} ± {slope['half']:.1f} MB an hour (95 %, "
            f"{slope['blocks']} blocks), from {slope['begin']:.0f} to {slope['end']:.0f}"
        )
    last = soak.samples[-1]
    report.line(
        f"at the end: {last['open_files']:.0f} open files, {last['threads']:.0f} threads, "
        f"{last['deleted_files_mapped']:.0f} files mapped whose version is gone"
    )
    assert soak.ended is not None
    code, seconds = soak.ended
    report.line(f"SIGTERM: exit code {code} after {seconds:.1f} s")
    report.close()
    problems = [*soak.accounts.lost[:5], *([] if code == 0 else [f"exit code {code}: {said[-5:]}"])]
    if not soak.accounts.contents_differ():
        problems.append("both contents score alike: nothing was shown of versions")
    if problems:
        raise TandemError("; ".join(problems))


def _latency(facts: dict[str, Any]) -> str:
    names = {"p50": "p50_ms", "p99": "p99_ms", "p99.9": "p999_ms"}
    return ", ".join(f"{name} {facts[key]:.1f} ms" for name, key in names.items())
