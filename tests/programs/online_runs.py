"""Script: trainings of a stream on forked ranks, which are killed again and again; one JSON report.

python -m tests.programs.online_runs FOLDER
python -m tests.programs.online_runs FOLDER 20      that many kills at random moments, by hand
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pipelines.online.online as job
import pipelines.online.publisher as publishing
import trainer.snapshot.publishing as snapshots
from tests.helpers.forked import fork_ranks, one_thread
from tests.helpers.launching import SETTINGS, overrides
from tests.helpers.logs import Row
from tests.helpers.streams import add_window, rows_of, write_stream
from tests.programs.living_runs import maps, tables_differ
from tests.programs.saving_runs import digests
from trainer.checkpoint import files
from trainer.data.stream.ledger import Ledger
from trainer.log.schema import FeatureInfo
from trainer.loop.loop import Trainer
from trainer.loop.online import WindowTrainer
from trainer.ranks.process_group import Ranks
from trainer.run_config import Config, load_config

ITEMS, WINDOWS = 200, 6
Before = Callable[[Ranks], None]


def raw(rows: list[Row], number: int) -> list[Row]:
    """The same with items that are born and die, and ids of any size."""
    rng = np.random.default_rng(number)
    ids = np.random.default_rng(0).integers(-(1 << 62), 1 << 62, ITEMS)

    def drawn(count: int) -> list[int]:
        found: list[int] = ids[(20 * number + rng.integers(0, 60, count)) % ITEMS].tolist()
        return found

    for row in rows:
        row["history_item_id"] = drawn(row["num_behaviors"])
        row["candidate_item_id"] = [drawn(count) for count in row["request_num_candidates"]]
    return rows


class InProcess:
    """Stands for the process that publishes: answers at once, in the process that trains."""

    answers: list[publishing.Answer]

    def __init__(self, places: publishing.Places, settings: Any, ranks: Ranks) -> None:
        self.given, self.answers = (places, settings, ranks), []

    def send(self, order: publishing.Order) -> None:
        self.answers.append(publishing.answer_to(order, *self.given))

    def poll(self, timeout: float | None) -> bool:
        return bool(self.answers)

    def recv(self) -> publishing.Answer:
        return self.answers.pop()

    def close(self) -> None:
        pass

    kill = join = close


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(kind: type, name: str, number: int) -> Before:
    """Have the process die right before a method is called for the n-th time."""

    def before(ranks: Ranks) -> None:
        method, calls = getattr(kind, name), [0]

        def counting(self: Any, *given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                die()
            return method(self, *given, **named)

        setattr(kind, name, counting)

    return before


def before_note(ranks: Ranks) -> None:
    """Have the process die when a version is published, and that is not written down."""
    publishing.write_text = lambda *given: die()  # type: ignore[assignment]


def after(seconds: float) -> Before:
    """Have the process end after a time, wherever it is, by a signal that nothing listens to."""

    def before(ranks: Ranks) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    return before


def before_latest(ranks: Ranks) -> None:
    """Have the process die when a version is there, and the newest is still said to be the one before."""
    snapshots.write_text = lambda *given: die()  # type: ignore[assignment]


class OnlineRuns:
    def __init__(self, root: Path, windows: int = WINDOWS) -> None:
        self.root = root
        self.stream = write_stream(root / "stream", item_id=FeatureInfo(rows=1, raw=True))
        for number in range(windows):
            add_window(self.stream, f"w{number}", raw(rows_of(number), number))
        add_window(self.stream, "w25", [])

    def config(self, **changes: Any) -> Config:
        words = {**SETTINGS, "checkpoint.every_steps": 0, "checkpoint.keep": 2}
        words |= {"ids.item_id.capacity": 130, "ids.item_id.shared_rows": 4, "data.batch_candidates": 40}
        words |= {k.replace("__", "."): v for k, v in changes.items()}
        return load_config(Path("configs/dare.toml"), overrides(words)[1::2])

    def run(
        self, name: str, ranks: int, before: Before = lambda ranks: None, windows: int = 0, **changes: Any
    ) -> list[int]:
        """Train what is there -> exit codes."""
        config, _ = job.for_stream(self.config(**changes), self.stream)
        said, out = self.root / f"{name}.said", self.root / name
        versions = self.root / f"{name}-versions" if ranks == 1 else None
        todo = job.OnlineJob(self.stream, out, versions, windows)

        def work(member: Ranks) -> None:
            file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)

            def started(self: publishing.VersionPublisher) -> tuple[Any, Any]:
                both = InProcess(self._places, self._settings, member)
                return both, both

            publishing.VersionPublisher._started = started  # type: ignore[method-assign]
            before(member)
            job.run(config, todo, member, lambda line: print(line, flush=True))

        return fork_ranks(ranks, work)

    def facts(self, name: str) -> dict[str, Any]:
        """What is left of a run."""
        run, versions = self.root / name, self.root / f"{name}-versions"
        newest = files.checkpoints(run / "checkpoints")[0]
        state = files.read_state(newest)
        ledger = Ledger.of_state(state["stream"]["ledger"])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        measured = [line for line in lines if line["split"] == "window"]
        manifests = [json.loads((path / "manifest.json").read_text()) for path in sorted(versions.glob("v*"))]
        return {
            "digests": digests(run),
            "maps": maps(run)[newest.name],
            "windows": [[each.name, each.outcome, each.step] for each in ledger.entries],
            "counts": dict(ledger.counts),
            "measured": [[line["step"], line["window"], line["samples"]] for line in measured],
            "cold": [line.get("cold_items", {}).get("samples", 0) for line in measured],
            "lag": [[line["lag_windows"], line["lag_s"]] for line in measured],
            "losses": [[line["step"], line["loss"]] for line in lines if line["split"] == "train"],
            "cursor": [state["cursor"][key] for key in ("window", "epoch", "blocks")],
            "candidates": state["candidates"],
            "versions": [[each["number"], each["step"], each["base"] is None] for each in manifests],
        }


def main(root: Path) -> None:
    runs, report = OnlineRuns(root), dict[str, Any]()
    every = {"online__full_every": 4}
    assert runs.run("whole", 1, **every) == [0], (root / "whole.said").read_text()
    kills: list[tuple[str, Before, dict[str, Any]]] = [
        ("before the first step", before_call(Trainer, "_set_rates", 1), {}),
        ("inside a window", before_call(Trainer, "_set_rates", 2), {}),
        ("inside a window, saved", before_call(Trainer, "_set_rates", 4), {"checkpoint__every_steps": 1}),
        ("after it was taken", before_call(WindowTrainer, "_measure", 2), {}),
        ("after it was measured", before_call(WindowTrainer, "_learn", 2), {}),
        ("before it is saved", before_call(Trainer, "_save", 1), {}),
        ("before it is published", before_call(publishing.VersionPublisher, "offer", 1), {}),
        ("published, not yet the newest", before_latest, {}),
        ("published, not written down", before_note, {}),
    ]
    report["codes"] = {}
    for name, before, changes in kills:
        report["codes"][name] = runs.run("killed", 1, before, **every, **changes)
    report["codes"]["to its end"] = runs.run("killed", 1, **every)
    for ranks, windows in ((2, 2), (1, 1), (3, 0)):
        done = runs.run("moved", ranks, windows=windows, train__pipeline="sparse_dist")
        assert done == [0] * ranks, (root / "moved.said").read_text()
    names = ("whole", "killed", "moved")
    newest = {name: files.checkpoints(root / name / "checkpoints")[0] for name in names}
    report["apart"] = tables_differ(newest["whole"], newest["moved"])
    report["facts"] = {name: runs.facts(name) for name in names}
    report["said"] = {name: (root / f"{name}.said").read_text() for name in names}
    (root / "report.json").write_text(json.dumps(report))


def kill_at_random(root: Path, kills: int) -> None:
    """Print whether ten windows end with the same facts after so many kills."""
    runs, rng, places = OnlineRuns(root, 10), np.random.default_rng(7), []
    every = {"online__full_every": 4, "checkpoint__every_steps": 2, "train__max_starts_without_progress": 0}
    started = time.monotonic()
    assert runs.run("whole", 1, **every) == [0], (root / "whole.said").read_text()
    whole = time.monotonic() - started
    while len(places) < kills:
        # Mostly less than a start with a window takes, so that not all windows are trained at once.
        seconds = float(rng.uniform(0.05, 0.25) * whole)
        if runs.run("killed", 1, after(seconds), **every) == [0]:
            break
        found = files.checkpoints(root / "killed" / "checkpoints")
        places.append(files.step_of(found[0]) if found else 0)
    assert runs.run("killed", 1, **every) == [0], (root / "killed.said").read_text()
    one, other = (runs.facts(name) for name in ("whole", "killed"))
    differs = [key for key in one if one[key] != other[key]]
    print(f"{len(places)} kills, newest checkpoint after each: {places}; differs: {differs or 'nothing'}")
    print("versions [number, step, whole]:", other["versions"])


if __name__ == "__main__":
    one_thread()
    if sys.argv[2:]:
        kill_at_random(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
