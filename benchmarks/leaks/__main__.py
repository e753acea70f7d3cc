"""Whether a request sees the future: noise in place of all that happens from it on must change nothing

    tandemrec bench leaks log --log LOG [--split test] [--delay 86400] [--search a_id --search b_id]
    tandemrec bench leaks ingest --events EVENTS --config CONFIG --cut 2017-11-17 [--new-words]

`log` draws a request of each user and replaces the user's history from the request's time on by other ids at
other times, and what is offered in later requests by other candidates. Then it compares what the reader
delivers: whole batches, bit for bit, with each request alone in its block, and request by request with all
requests of the user in shared blocks. `ingest` replaces the raw events from `--cut` on by events of other
users, items and times, ingests both tables and compares every request before the cut.

Each prints one row of a table; a control, where the noise begins with the newest behavior that the request
does see, has to differ, or nothing was compared at all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report
from benchmarks.leaks.event_noise import Tail, compare_ingest
from benchmarks.leaks.log_noise import compare_log
from pipelines.ingest.ingest import load_ingest_config
from trainer.config.sections import DataConfig, SearchConfig

LOG_COLUMNS = {
    "noise from": "{noise_from}",
    "requests compared": "{requests:,}",
    "behaviors replaced": "{replaced:,}",
    "requests differ": "{differ:,}",
    "batches": "{batches:,}",
    "batches differ": "{batches_differ:,}",
}


def main(words: Sequence[str]) -> None:
    options = Options("leaks", __doc__)
    options.add_argument("verb", choices=("log", "ingest"))
    options.add_argument("--search", action="append", default=[], help="a level of the hard search")
    options.add_argument("--history-length", type=int, default=500)
    options.add_argument("--delay", type=int, default=0, help="ingestion delay, seconds")
    of_log = options.add_argument_group("log")
    of_log.add_argument("--log", type=Path)
    of_log.add_argument("--split", default="train")
    of_log.add_argument("--rows", type=int, default=10**9, help="users at most")
    of_ingest = options.add_argument_group("ingest")
    of_ingest.add_argument("--events", type=Path)
    of_ingest.add_argument("--config", type=Path, metavar="FILE", help="TOML configuration of ingest")
    options.overriding(of_ingest)
    of_ingest.add_argument("--plain", type=Path, help="a log that these events and this config gave")
    of_ingest.add_argument("--cut", help="first day (UTC) of the noise")
    of_ingest.add_argument("--every", type=int, default=1, help="only users whose number it divides")
    of_ingest.add_argument("--new-words", action="store_true", help="noise has items of its own")
    given = options.read(words)
    needed = ("log",) if given.verb == "log" else ("events", "config", "cut")
    if missing := [f"--{name}" for name in needed if getattr(given, name) is None]:
        options.error(f"`{given.verb}` needs {' and '.join(missing)}")
    data = DataConfig(
        log=given.log or Path(),
        history_length=given.history_length,
        ingestion_delay=given.delay,
        search=SearchConfig(levels=tuple(given.search)),
    )
    report = Report(given, "Leaks", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        if given.verb == "log":
            _compare_log(data, given, Path(folder), report)
        else:
            _compare_ingest(data, given, Path(folder) / "logs", report)
    report.close()


def _compare_log(data: DataConfig, given: argparse.Namespace, folder: Path, report: Report) -> None:
    for early, name in ((False, "the request on"), (True, "the newest visible behavior on (control)")):
        outcome = compare_log(data, given.split, given.rows, folder / str(early), early)
        report.rows.append({"noise_from": name, **asdict(outcome)})
    report.table(LOG_COLUMNS, report.rows)


def _compare_ingest(data: DataConfig, given: argparse.Namespace, folder: Path, report: Report) -> None:
    cut = int(datetime.fromisoformat(given.cut).replace(tzinfo=UTC).timestamp())
    tail = Tail(cut, new_words=given.new_words)
    config = load_ingest_config(given.config, given.overrides)
    outcome = compare_ingest(given.events, config, tail, data, folder, given.plain, given.every)
    report.rows = [asdict(outcome)]
    report.table({name: f"{{{name}:,}}" for name in report.rows[0]}, report.rows)
