"""What saving a checkpoint costs training, beside the disk's own speed in the same run

Saves, verifies and loads the config's model on one rank, all kinds in turn. Tables are as large as the config
says; where it sets no `tables.<feature>.rows`, the largest feature gets the rows that make 2 GB. Files are
written beside the file of --json, or in the current folder, and removed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch.distributed.checkpoint as dcp

from benchmarks.harness.options import Options
from benchmarks.harness.report import Report, Row
from benchmarks.harness.timing import seconds_of, spread
from trainer.assemble import build_sharded, resolve_groups
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.background import Saver
from trainer.checkpoint.writer import HashedWriter
from trainer.config.tables import TableConfig
from trainer.log.schema import LogManifest, read_manifest
from trainer.ranks.process_group import process_group
from trainer.run_config import Config, load_config
from trainer.sealed_folder import sync
from trainer.update.step import make_optimizer

_BYTES = 2e9
_PIECE = 1 << 24  # bytes
_COLUMNS = {"": "{name}", "median s": "{seconds:.2f}", "min-max": "{min:.2f}-{max:.2f}", "GB/s": "{shown}"}
Taken = dict[str, list[float]]


def main(words: Sequence[str]) -> None:
    given = Options("checkpoint", __doc__).measuring(config=True).read(words)
    settings = load_config(given.config, given.overrides)
    manifest = read_manifest(settings.data.log)
    settings = _sized(settings, manifest)
    report = Report(given, "Checkpoint", seed=settings.train.seed)
    place = given.json.parent if given.json is not None else Path.cwd()
    device = settings.train.device
    with (
        process_group(device=device) as ranks,
        tempfile.TemporaryDirectory(dir=place, prefix="bench-") as folder,
    ):
        sharded = build_sharded(settings, manifest, ranks)
        optimizer = make_optimizer(sharded.model, settings.train)
        tensors = {"model": sharded.model.state_dict(), "optim": optimizer.state_dict()}
        taken, size = _measure(settings, tensors, Path(folder), given.repeats)
    report.line(f"checkpoint of {size / 1e9:.2f} GB on one rank, n = {given.repeats}")
    report.rows, report.ratios = _rows(taken, size), _ratios(taken)
    report.facts = {"bytes": size, "repeats": given.repeats}
    report.table(_COLUMNS, report.rows)
    report.show_ratios()
    report.close()


def _sized(settings: Config, manifest: LogManifest) -> Config:
    """The config, with 2 GB of tables if it does not set the rows of a table itself."""
    if settings.tables:
        return settings
    groups = resolve_groups(settings, manifest).values()
    largest = max((t for group in groups for t in group.tables), key=lambda t: t.rows).feature
    width = sum(4 * t.dim + 4 for group in groups for t in group.tables if t.feature == largest)
    tables = {largest: TableConfig(rows=int(_BYTES / width))}
    return settings.model_copy(update={"tables": tables})


def _measure(settings: Config, tensors: Mapping[str, Any], folder: Path, repeats: int) -> tuple[Taken, int]:
    """-> (seconds of every kind, bytes of a checkpoint)."""
    taken: Taken = {}
    first, size = folder / "first", 0
    path = first / "step-00000001"
    waiting, background = (
        Saver(first, settings.checkpoint.model_copy(update={"mode": mode}), lambda line: None)
        for mode in ("sync", "async")
    )

    def save(saver: Saver) -> None:
        shutil.rmtree(first, ignore_errors=True)
        sync(folder)
        saver.save(1, tensors, {"step": 1})

    def take(name: str, work: Callable[[], object]) -> None:
        taken.setdefault(name, []).append(seconds_of(work).wall)

    def save_in_background(name: str) -> None:
        take(name, partial(save, background))
        background.settle()

    for number in range(repeats):
        take("save, sync", partial(save, waiting))
        size = sum(file.stat().st_size for file in path.iterdir())
        take("verify", partial(checkpoint.verify, path))
        take("load", partial(checkpoint.load_tensors, path, dict(tensors)))
        shutil.rmtree(first)
        take("raw write and fsync", partial(_raw, folder / "raw", size))
        take("DCP alone", partial(dcp.save, dict(tensors), checkpoint_id=folder / "plain"))
        shutil.rmtree(folder / "plain")
        take("DCP, hashed", partial(_hashed, tensors, folder / "hashed"))
        shutil.rmtree(folder / "hashed")
        stall = "stall, async, first" if number == 0 else "stall, async"
        take("save, async, whole", partial(save_in_background, stall))
        if number == 0:
            save_in_background("stall, async")
        shutil.rmtree(first)
    return taken, size


def _raw(file: Path, size: int) -> None:
    """Write so many bytes through the page cache to the disk."""
    content = np.random.default_rng(0).integers(0, 256, _PIECE, dtype=np.uint8).tobytes()
    with file.open("wb") as stream:
        for start in range(0, size, _PIECE):
            stream.write(content[: size - start])
    sync(file)
    file.unlink()


def _hashed(tensors: Mapping[str, Any], folder: Path) -> None:
    dcp.save(dict(tensors), storage_writer=HashedWriter(folder))


def _rows(taken: Taken, size: int) -> list[Row]:
    rows = []
    for name, values in taken.items():
        seconds = spread(values, "seconds")
        rate = size / seconds["seconds"] / 1e9
        shown = "" if name.startswith("stall") else f"{rate:.2f}"
        rows.append({"name": name, **seconds, "gb_per_s": rate, "shown": shown})
    return rows


def _ratios(taken: Taken) -> dict[str, float]:
    middle = {name: median(values) for name, values in taken.items()}
    return {
        "async_stall_to_sync": middle["stall, async"] / middle["save, sync"],
        "first_async_stall_to_sync": middle["stall, async, first"] / middle["save, sync"],
        "hashing_overhead": middle["DCP, hashed"] / middle["DCP alone"] - 1,
        "save_to_raw_disk": middle["raw write and fsync"] / middle["save, sync"],
    }
