"""Memory, seconds and disk of each stage of a run with large tables, beside what arithmetic asks for

    tandemrec bench memory --set data.log=LOG --rows 20000000 --dim 4 --dtype fp16 --dir DIR

Trains, saves, resumes, exports and serves the config's model with a table of so many rows for one feature of
the log, which may be tiny; each stage is a process of its own ("save after it" is the end of the resumed one,
a delta where checkpoint.full_every says so). All is done once more with as few rows as the log has ids: what
a stage takes beyond that, it takes for its rows. Its files go to a folder below --dir and are removed.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.harness.options import Options, own_command
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import time_process
from embeddings.errors import ConfigError
from embeddings.lookup.stored import row_bytes
from embeddings.optimizers import ROW_OPTIMIZERS
from pipelines import train
from pipelines.export import export
from trainer.assemble import resolve_groups
from trainer.checkpoint.warm_start import unshard_run
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config
from trainer.snapshot import load_snapshot

# One process each; one that saves trains before, and tells what either took.
STAGES = ("save sync", "save async", "resume", "unshard", "start from tables", "export", "serve")
_COLUMNS = {
    "stage": "{stage}",
    "s": "{seconds:.1f}",
    "peak MB": "{peak_mb:,.0f}",
    "without rows": "{base_mb:,.0f}",
    "for rows": "{rows_mb:,.0f}",
    "least": "{least_mb:,.0f}",
    "rows / least": "{ratio:.2f}",
    "not mapped": "{own_mb:,.0f}",
    "disk MB": "{disk_mb:,.0f}",
    "disk, least": "{disk_least_mb:,.0f}",
}
_STATUS = Path("/proc/self/status")
_LOOK_S = 0.02


def main(words: Sequence[str]) -> None:
    options = Options("memory", __doc__)
    options.overriding()
    options.add_argument("--config", type=Path, default=Path("configs/twin.toml"))
    options.add_argument("--feature", default="item_id", help="whose tables are large")
    options.add_argument("--rows", type=int, default=20_000_000)
    options.add_argument("--dim", type=int, default=4)
    options.add_argument("--dtype", choices=["fp32", "fp16"], default="fp16")
    options.add_argument("--export-dtype", choices=["fp32", "fp16", "int8"], default="int8")
    options.add_argument("--steps", type=int, default=3, help="of training, before the save and after it")
    options.add_argument("--ranks", type=int, default=1, help="of train, save and resume")
    options.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    options.add_argument("--dir", type=Path, required=True, help="on a disk with room")
    options.add_argument("--alone", action="store_true", help="without the run of few rows to compare with")
    options.add_argument("--part", help="for the process of one stage")
    given = options.read(words)
    if given.part:
        _stage(given)
        return
    report = Report(given, "Memory", seed=17, n=1)
    large = _all_stages(given, given.rows)
    small = None if given.alone else _all_stages(given, 0)
    for stage, row in large.items():
        if small is not None:
            # Of file mappings the system decides how much is resident: see "not mapped".
            row["base_mb"] = small[stage]["peak_mb"]
            row["rows_mb"] = row["peak_mb"] - row["base_mb"]
            row["own_rows_mb"] = row["own_mb"] - small[stage]["own_mb"]
            if row["least_mb"]:
                row["ratio"] = row["rows_mb"] / row["least_mb"]
                report.ratios[f"{stage}: rows to least"] = row["ratio"]
        report.rows.append(row)
    report.table(_COLUMNS, report.rows)
    report.line(
        "peak: the most that was resident (VmHWM), of the rank that had most; not mapped: the most of it "
        "that was no file's (RssAnon), looked at every 20 ms"
    )
    report.close()


def _all_stages(given: Namespace, rows: int) -> dict[str, Row]:
    """What each stage took; 0 rows: as many as the log has."""
    found: dict[str, Row] = {}
    given.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.dir, prefix="bench-") as name:
        folder = Path(name)
        least = least_bytes(_settings(given, rows, "sync"), given.export_dtype)
        for stage in STAGES:
            if stage not in given.stages:
                continue
            if stage.startswith("save"):
                shutil.rmtree(folder / "run", ignore_errors=True)
            _run(given, rows, folder, stage, found)
        for stage, row in found.items():
            tables, on_disk = least["tables"] / 1e6, "stored" if stage == "export" else "tables"
            # Blocks of rows are all that an export or a server need hold.
            times = {"save async": 2, "unshard": 0, "export": 0, "serve": 0}.get(stage, 1)
            row["least_mb"] = times * tables / given.ranks
            if "disk_mb" in row:
                row["disk_least_mb"] = least[on_disk] / 1e6
    return found


def least_bytes(config: Config, export_dtype: Any) -> dict[str, int]:
    """Bytes of all tables with their optimizers' state (`tables`), and of their rows exported (`stored`)."""
    found = {"tables": 0, "stored": 0}
    for name, group in resolve_groups(config, read_manifest(config.data.log)).items():
        rule = ROW_OPTIMIZERS[config.groups[name].optimizer]
        for table in group.tables:
            weights = table.rows * row_bytes(table.dim, config.groups[name].dtype)
            found["tables"] += weights + rule.state_bytes(table.rows, table.dim)
            found["stored"] += table.rows * row_bytes(table.dim, export_dtype)
    return found


def _settings(given: Namespace, rows: int, mode: str, steps: int = 0, *more: str) -> Config:
    words = ["checkpoint.every_steps=0", f"checkpoint.mode={mode}"]
    words += [f"train.max_steps={steps or given.steps}", "train.epochs=1000"]
    words += [f"tables.{given.feature}.rows={rows}"] if rows else []
    for name in load_config(given.config).groups:
        words += [f"groups.{name}.dim={given.dim}", f"groups.{name}.dtype={given.dtype}"]
    return load_config(given.config, [*words, *given.overrides, *more])


def _run(given: Namespace, rows: int, folder: Path, stage: str, found: dict[str, Row]) -> None:
    """One stage in processes of its own; what it saw of itself goes to `found`."""
    words = ["--config", str(given.config), "--feature", given.feature]
    words += ["--rows", str(rows), "--dim", str(given.dim), "--dtype", given.dtype, "--dir", str(folder)]
    words += ["--export-dtype", given.export_dtype, "--steps", str(given.steps), "--part", stage]
    words += [word for each in given.overrides for word in ("--set", each)]
    command = [*own_command("memory"), *words]
    trains = stage not in ("unshard", "export", "serve")
    if given.ranks > 1 and trains:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={given.ranks}", *command[1:]]
    time_process(command)
    ranks = [json.loads(file.read_text()) for file in sorted(folder.glob("figures-*.json"))]
    for file in folder.glob("figures-*.json"):
        file.unlink()
    for name in ranks[0]:
        most: Row = {key: max(each[name][key] for each in ranks) for key in ranks[0][name]}
        found[name] = {"stage": name, **most}
    parts = {"export": folder / "snapshot", "save sync": folder / "run" / "checkpoints"}
    parts["unshard"] = folder / "tables"
    parts["save async"] = parts["save sync"]
    if stage == "resume":
        # Of a delta, where checkpoint.full_every says so.
        newest = max((folder / "run" / "checkpoints").iterdir())
        found["save after it"]["disk_mb"] = _size(newest)
    if stage in parts:
        found[stage]["disk_mb"] = _size(parts[stage])


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


class _Watch:
    """What this process takes, stage by stage."""

    def __init__(self) -> None:
        self.found: dict[str, Row] = {}
        self._own, self._started = 0.0, time.perf_counter()

    def look(self) -> None:
        self._own = max(self._own, _resident("RssAnon"))

    def close(self, stage: str) -> None:
        """What was taken since the last stage's end is this one's."""
        self.look()
        now = time.perf_counter()
        taken = {"seconds": now - self._started, "peak_mb": _resident("VmHWM"), "own_mb": self._own}
        self.found[stage] = taken
        self._own, self._started = 0.0, now
        # The peak begins anew (Linux, Documentation/filesystems/proc.rst).
        Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def _watching() -> Any:
    watch, over = _Watch(), threading.Event()

    def looking() -> None:
        while not over.wait(_LOOK_S):
            watch.look()

    thread = threading.Thread(target=looking, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def _resident(kind: str) -> float:
    """Megabytes, by its line in /proc/self/status."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{kind}:"))
    return int(line.split()[1]) * 1024 / 1e6


def _stage(given: Namespace) -> None:
    """What the process of one stage does; its figures go to a file for each rank."""
    run, snapshot, rank = given.dir / "run", given.dir / "snapshot", 0
    with _watching() as watch:
        if given.part not in ("unshard", "start from tables", "export", "serve"):
            again, mode = given.part == "resume", "async" if given.part == "save async" else "sync"
            settings = _settings(given, given.rows, mode, given.steps + (1 if again else 0))
            if again and not (run / "checkpoints").is_dir():
                raise ConfigError("--stages: resume needs a save before it")
            watched = {settings.train.max_steps: "resume" if again else "train"}
            with process_group(settings.train.timeout_s, settings.train.device) as ranks:
                rank = ranks.rank
                train.run(settings, run, ranks, _at(watched, watch))
                dist.barrier()
            watch.close("save after it" if again else given.part)
        elif given.part == "unshard":
            unshard_run(run, given.dir / "tables")
            watch.close("unshard")
        elif given.part == "start from tables":
            settings = _settings(given, given.rows, "sync", 1, f"train.init_from={given.dir / 'tables'}")
            with process_group(settings.train.timeout_s, settings.train.device) as ranks:
                rank = ranks.rank
                train.run(settings, given.dir / "next", ranks, _at({1: given.part}, watch))
                dist.barrier()
        elif given.part == "export":
            export(run, snapshot, given.export_dtype, given.export_dtype, parity_requests=20)
            watch.close("export")
        else:
            load_snapshot(max(snapshot.iterdir())).self_check()
            watch.close("serve")
    (given.dir / f"figures-{rank}.json").write_text(json.dumps(watch.found))


def _at(steps: dict[int, str], watch: _Watch) -> Callable[[int], None]:
    def after_step(step: int) -> None:
        if step in steps:
            watch.close(steps[step])

    return after_step
