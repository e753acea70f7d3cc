"""AUC, GAUC and logloss of presets on one log, over several seeds

    tandemrec bench models --log LOG --config configs/dare.toml --config configs/twin.toml \
        --seeds 17,18,19 --out runs/models --jobs 2 [--set train.epochs=2 ...] [--page FILE.md]

Every run is a process of its own that does what `tandemrec train` and `tandemrec evaluate` do, with one
thread (two one-thread runs use two cores better than one run of two threads). A finished run is one line of
OUT/results.jsonl; started again, the same command skips what is there and resumes what was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.harness.options import Options, own_command
from benchmarks.harness.report import Report

Record = dict[str, Any]
RESULTS = "results.jsonl"
SPLITS = ("validation", "test")
METRICS = ("auc", "gauc", "logloss")


@dataclass(frozen=True)
class Job:
    """One run to make: a preset with overrides and a seed. `name` is the run folder and the key."""

    preset: Path
    overrides: tuple[str, ...]
    seed: int
    name: str
    tables: str

    def words(self, out: Path, threads: int) -> list[str]:
        sets = [word for override in self.overrides for word in ("--set", override)]
        return ["--one", str(self.preset), "--out", str(out / self.name), "--threads", str(threads), *sets]


def make_job(preset: Path, log: Path, overrides: Sequence[str], seed: int) -> Job:
    """Resolve the config and the log. All that decides the numbers is part of the name."""
    from trainer.checkpoint.compatible import log_fingerprint
    from trainer.log.schema import read_manifest
    from trainer.run_config import load_config

    every = (*overrides, f"data.log={log}", f"train.seed={seed}")
    config = load_config(preset, every)
    tree = config.model_dump(mode="json")
    tree["data"]["log"] = log_fingerprint(read_manifest(log))
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    tables = ", ".join(f"{name} {_dims(group.dim)}" for name, group in config.groups.items())
    return Job(preset, every, seed, f"{preset.stem}-{seed}-{digest[:10]}", tables)


def _dims(dim: int | Mapping[str, int]) -> str:
    return str(dim) if isinstance(dim, int) else "/".join(map(str, dim.values()))


def run_one(given: Any) -> None:
    """Train and evaluate the preset `given.one` in this process; leaves `summary.json` in the run folder."""
    import torch

    from pipelines.evaluate import evaluate
    from pipelines.train import train

    torch.set_num_threads(given.threads)
    train(given.one, given.out, given.overrides)
    for split in SPLITS:
        evaluate(given.out, split)


def results(out: Path) -> dict[str, Record]:
    """Finished runs by name."""
    return {record["name"]: record for record in records_of(out / RESULTS)}


def records_of(path: Path) -> list[Record]:
    """The lines of a file of results. One that a kill has cut short does not count."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def keep(out: Path, record: Record) -> None:
    """Append one line and wait until it is on the disk."""
    with (out / RESULTS).open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
            file.write(b"\n" if torn else b"")
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run_all(
    log: Path, overrides: Sequence[str], given: Any, command: Sequence[str], extra: str = ""
) -> list[Record]:
    """Make a run of each preset and seed, see `run_jobs`."""
    jobs = [make_job(preset, log, overrides, seed) for preset in given.config for seed in seeds_of(given)]
    return run_jobs(jobs, given, command, extra)


def seeds_of(given: Any) -> list[int]:
    """What `--seeds` names."""
    return [int(seed) for seed in given.seeds.split(",")]


def run_jobs(jobs: Sequence[Job], given: Any, command: Sequence[str], extra: str = "") -> list[Record]:
    """Make the runs that are not there yet, `given.jobs` of them side by side; returns all, in order.

    Args:
        given: the values of `add_options`.
        command: what starts a process that accepts the words of `Job.words`.
        extra: a JSON file in the run folder whose entries join the record.
    """
    out, at_once, threads = given.out, given.jobs, given.threads
    out.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if job.name not in results(out)]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are there already", flush=True)
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    failed = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended too, below
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[job.name] = (job, _start(job, out, threads, command), time.perf_counter())
            time.sleep(0.2)
            for name, (job, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    failed.append(name)
                    print(f"{name}: exit code {process.returncode}, see {out / name}.log", flush=True)
                    continue
                record = record_of(job, out, time.perf_counter() - started, threads, extra)
                keep(out, record)
                print(f"{name}: test AUC {record['test']['auc']:.4f}", flush=True)
    finally:
        for _, process, _ in running.values():
            process.terminate()
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed; the same command tries them again")
    kept = results(out)
    return [kept[job.name] for job in jobs]


def _start(job: Job, out: Path, threads: int, command: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (out / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*command, *job.words(out, threads)], stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def record_of(job: Job, out: Path, seconds: float, threads: int, extra: str) -> Record:
    """What a finished run is kept as, from the files in its folder; see `run_jobs`."""
    summary = json.loads((out / job.name / "summary.json").read_text(encoding="utf-8"))
    more = json.loads((out / job.name / extra).read_text(encoding="utf-8")) if extra else {}
    record = {
        "name": job.name,
        "preset": job.preset.stem,
        "seed": job.seed,
        "tables": job.tables,
        "overrides": list(job.overrides),
        **{key: summary[key] for key in (*SPLITS, "samples", "steps", "wall_s", "cpu_s", "versions")},
        "samples_per_s": summary["samples"] / summary["wall_s"],
        "process_s": seconds,
        "threads": threads,
    }
    return {**record, **({"extra": more} if extra else {})}


def mean(values: Sequence[float], digits: int = 4) -> str:
    """`mean ± deviation`; the mean alone of a single value, a dash where there was nothing to measure."""
    if any(math.isnan(value) for value in values):
        return "-"
    shown = f"{fmean(values):.{digits}f}"
    return shown if len(values) < 2 else f"{shown} ± {stdev(values):.{digits}f}"


def by_preset(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Records of one preset together, in order of first appearance."""
    for preset in dict.fromkeys(record["preset"] for record in records):
        yield preset, [record for record in records if record["preset"] == preset]


def show(report: Report, records: Sequence[Record]) -> None:
    """A line for each preset, with mean and standard deviation over its seeds."""
    head = ["preset", "tables", "seeds", *(f"{split} {name}" for split in SPLITS for name in METRICS)]
    lines = []
    for preset, same in by_preset(records):
        cells = [preset, same[0]["tables"], str(len(same))]
        cells += [mean([record[split][name] for record in same]) for split in SPLITS for name in METRICS]
        cells += [f"{fmean(record[name] for record in same):,.0f}" for name in ("samples_per_s", "wall_s")]
        lines.append(cells)
    report.cells([*head, "samples/s", "training s"], lines)


def environment_line(records: Sequence[Record], at_once: int) -> str:
    """Machine and versions of the runs."""
    versions = records[0]["versions"]
    shown = ", ".join(f"{name} {version}" for name, version in versions.items() if name != "machine")
    threads = records[0]["threads"]
    return f"{versions['machine']}, {threads} thread(s) a run, {at_once} run(s) side by side; {shown}."


def add_options(options: Options) -> None:
    """Options that the comparisons of models share."""
    options.add_argument("--config", action="append", type=Path, default=[], help="a preset; repeatable")
    options.add_argument("--seeds", default="17", help="comma-separated")
    options.overriding()
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--jobs", type=int, default=1, help="runs side by side")
    options.add_argument("--threads", type=int, default=1, help="of each run")
    options.add_argument("--one", type=Path, help="make one run only, of this preset, in this process")


def read_options(options: Options, words: Sequence[str]) -> Any | None:
    """The values of `add_options` and `--log`; None where this process was to make one run, and has."""
    options.add_argument("--log", type=Path)
    given = options.read(words)
    if given.one:
        run_one(given)
        return None
    if not given.config or not given.log:
        options.error("name at least one --config, and a --log")
    return given


def main(words: Sequence[str]) -> None:
    options = Options("models", __doc__)
    add_options(options)
    given = read_options(options, words)
    if given is None:
        return
    report = Report(given, "Models", n=len(seeds_of(given)))
    report.rows = run_all(given.log.absolute(), given.overrides, given, own_command("models"))
    show(report, report.rows)
    report.line(environment_line(report.rows, given.jobs))
    report.close()
