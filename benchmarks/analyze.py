"""Seconds and memory of `tandemrec analyze` on a run whose tables have many rows, section by section

    tandemrec bench analyze --log LOG --dir DIR

Trains a few steps of the config with tables of so many rows for one feature of the log, which may be small,
then analyses the run: each section in a process of its own, and all of them in one. A run that is in DIR
already is analysed as it is.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import time_process
from pipelines.analyze.options import SAMPLE
from pipelines.analyze.sections import SECTIONS

# What a report of 10 million rows a table may take on two cores.
MOST_SECONDS, MOST_MB = 120, 2000
_COLUMNS = {
    "sections": "{sections}",
    "s": "{seconds:.1f}",
    "cpu s": "{cpu_s:.1f}",
    "peak MB": "{peak_mb:,.0f}",
}
_VERB = (sys.executable, "-m", "launch.cli")


def main(words: Sequence[str]) -> None:
    options = Options("analyze", __doc__)
    options.overriding()
    options.add_argument("--config", type=Path, default=Path("configs/dare.toml"))
    options.add_argument("--log", type=Path, required=True)
    options.add_argument("--feature", default="item_id", help="whose tables are large")
    options.add_argument("--rows", type=int, default=10_000_000)
    options.add_argument("--attention-dim", type=int, default=16)
    options.add_argument("--representation-dim", type=int, default=64)
    options.add_argument("--steps", type=int, default=50, help="of training")
    options.add_argument("--sample", type=int, default=SAMPLE, help="as of the verb")
    options.add_argument("--what", nargs="*", choices=[*SECTIONS], default=[*SECTIONS], help="measured alone")
    options.add_argument("--dir", type=Path, required=True, help="on a disk with room")
    given = options.read(words)
    report = Report(given, "Analysis of large tables", seed=17, n=1)
    run = given.dir / "run"
    if not run.is_dir():
        time_process(_training(given, run))
    for name in [*given.what, ""]:
        report.rows.append(_measured(given, run, name))
    whole = report.rows[-1]
    report.table(_COLUMNS, report.rows)
    report.line(
        "Each row is a process of its own, start and verification of the checkpoint included. "
        f"A whole report may take {MOST_SECONDS} s and {MOST_MB:,} MB."
    )
    report.ratios |= {
        "seconds to allowed": whole["seconds"] / MOST_SECONDS,
        "memory to allowed": whole["peak_mb"] / MOST_MB,
    }
    report.show_ratios(2)
    report.close()


def _training(given: Namespace, run: Path) -> list[str]:
    settings = [
        f"data.log={given.log}",
        f"tables.{given.feature}.rows={given.rows}",
        f"groups.attention.dim={given.attention_dim}",
        f"groups.representation.dim={given.representation_dim}",
        f"train.max_steps={given.steps}",
        "checkpoint.every_steps=0",
        *given.overrides,
    ]
    words = ["train", "--config", str(given.config), "--out", str(run)]
    return [*_VERB, *words, *(word for each in settings for word in ("--set", each))]


def _measured(given: Namespace, run: Path, name: str) -> Row:
    """One report, of one section or of all."""
    words = ["analyze", str(run), "--out", str(given.dir / f"report-{name or 'all'}")]
    words += ["--sample", str(given.sample), *(["--what", name] if name else [])]
    seconds, peak = time_process([*_VERB, *words])
    taken = {"seconds": seconds.wall, "cpu_s": seconds.cpu, "peak_mb": peak / 1e6}
    return {"sections": name or "all", **taken}
