"""`tandemrec bench checkpoint`: what a save costs training, beside the disk's own speed in the same run."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp

from benchmarks.report import required, write_report
from pipelines.console import quiet_third_parties, table_lines
from trainer.assemble import build_sharded, resolve_groups
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.background import Saver
from trainer.checkpoint.writer import HashedWriter
from trainer.config.tables import TableConfig
from trainer.log.schema import LogManifest, read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config
from trainer.run_folder import versions
from trainer.sealed_folder import sync
from trainer.update.step import make_optimizer

_BYTES = 2e9
_PIECE = 1 << 24  # bytes
Seconds = dict[str, list[float]]


def bench_checkpoint(
    config: Path | None, overrides: Sequence[str], repeats: int, report: Path | None
) -> None:
    """Save, verify and load the config's model on one rank, `repeats` times, all kinds in turn.

    Tables are as large as the config says; where it sets no `tables.<feature>.rows`, the largest feature
    gets the rows that make 2 GB. Files are written beside `report`, or in the current folder, and removed.
    """
    quiet_third_parties()
    settings = load_config(required(config), overrides)
    manifest = read_manifest(settings.data.log)
    settings = _sized(settings, manifest)
    place = report.parent if report is not None else Path.cwd()
    device = settings.train.device
    with (
        process_group(device=device) as ranks,
        tempfile.TemporaryDirectory(dir=place, prefix="bench-") as folder,
    ):
        sharded = build_sharded(settings, manifest, ranks)
        optimizer = make_optimizer(sharded.model, settings.train)
        tensors = {"model": sharded.model.state_dict(), "optim": optimizer.state_dict()}
        seconds, size = _measure(settings, tensors, Path(folder), repeats)
    rows, ratios = _rows(seconds, size), _ratios(seconds)
    print(f"checkpoint of {size / 1e9:.2f} GB on one rank, n = {repeats}")
    cells = [[r["name"], f"{r['seconds']:.2f}", f"{r['min']:.2f}-{r['max']:.2f}", r["shown"]] for r in rows]
    print("\n".join(table_lines(["", "median s", "min-max", "GB/s"], cells)))
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    print("; ".join(f"{name} {version}" for name, version in versions().items()))
    if report is not None:
        write_report(report, rows, ratios, {"bytes": size, "repeats": repeats})


def _sized(settings: Config, manifest: LogManifest) -> Config:
    """The config with 2 GB of tables, where it does not say how many rows it wants."""
    if settings.tables:
        return settings
    groups = resolve_groups(settings, manifest).values()
    largest = max((t for group in groups for t in group.tables), key=lambda t: t.rows).feature
    width = sum(4 * t.dim + 4 for group in groups for t in group.tables if t.feature == largest)
    tables = {largest: TableConfig(rows=int(_BYTES / width))}
    return settings.model_copy(update={"tables": tables})


def _measure(settings: Config, tensors: Mapping[str, Any], folder: Path, repeats: int) -> tuple[Seconds, int]:
    """-> (seconds of every kind, bytes of a checkpoint)."""
    seconds: Seconds = {}
    first = folder / "first"
    waiting = Saver(first, settings.checkpoint.model_copy(update={"mode": "sync"}), lambda line: None)
    beside = Saver(first, settings.checkpoint.model_copy(update={"mode": "async"}), lambda line: None)

    def save(saver: Saver) -> None:
        shutil.rmtree(first, ignore_errors=True)
        sync(folder)
        saver.save(1, tensors, {"step": 1})

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    size = 0
    for number in range(repeats):
        timed("save, sync", lambda: save(waiting))
        path = first / "step-00000001"
        size = sum(file.stat().st_size for file in path.iterdir())
        timed("verify", partial(checkpoint.verify, path))
        timed("load", partial(checkpoint.load_tensors, path, dict(tensors)))
        shutil.rmtree(first)
        timed("raw write and fsync", partial(_raw, folder / "raw", size))
        timed("DCP alone", lambda: dcp.save(dict(tensors), checkpoint_id=folder / "plain"))
        shutil.rmtree(folder / "plain")
        timed("DCP, hashed", lambda: _hashed(tensors, folder / "hashed"))
        shutil.rmtree(folder / "hashed")
        started = time.perf_counter()
        timed("stall, async, first" if number == 0 else "stall, async", lambda: save(beside))
        beside.settle()
        seconds.setdefault("save, async, whole", []).append(time.perf_counter() - started)
        if number == 0:
            timed("stall, async", lambda: save(beside))
            beside.settle()
        shutil.rmtree(first)
    return seconds, size


def _raw(file: Path, size: int) -> None:
    """So many bytes, through the page cache to the disk."""
    content = np.random.default_rng(0).integers(0, 256, _PIECE, dtype=np.uint8).tobytes()
    with file.open("wb") as stream:
        for start in range(0, size, _PIECE):
            stream.write(content[: size - start])
    sync(file)
    file.unlink()


def _hashed(tensors: Mapping[str, Any], folder: Path) -> None:
    dcp.save(dict(tensors), storage_writer=HashedWriter(folder))


def _rows(seconds: Seconds, size: int) -> list[dict[str, Any]]:
    rows = []
    for name, values in seconds.items():
        middle = statistics.median(values)
        rate = size / middle / 1e9
        shown = "" if name.startswith("stall") else f"{rate:.2f}"
        rows.append(
            {"name": name, "seconds": middle, "min": min(values), "max": max(values), "gb_per_s": rate}
            | {"shown": shown, "n": len(values)}
        )
    return rows


def _ratios(seconds: Seconds) -> dict[str, float]:
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "async_stall_to_sync": middle["stall, async"] / middle["save, sync"],
        "first_async_stall_to_sync": middle["stall, async, first"] / middle["save, sync"],
        "hashing_overhead": middle["DCP, hashed"] / middle["DCP alone"] - 1,
        "save_to_raw_disk": middle["raw write and fsync"] / middle["save, sync"],
    }
