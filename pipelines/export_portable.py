"""`tandemrec export --format`: a snapshot's model for runtimes that know nothing of this project."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embeddings.errors import ConfigError, SnapshotError
from pipelines.console import quiet_third_parties
from pipelines.export_version import ExportOptions, publish_version
from pipelines.score import open_requests
from trainer.log.schema import read_manifest
from trainer.portable import dense, triton
from trainer.portable.building import Portable, portable_of
from trainer.portable.folder import (
    README,
    SIGNATURE,
    PortableManifest,
    read,
    read_recorded,
    seal,
    write_recorded,
)
from trainer.portable.formats import FORMATS
from trainer.portable.parity import BOUND, Compared, Comparison
from trainer.portable.readme import page
from trainer.ranks.device import DeviceName
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder, versions
from trainer.sealed_folder import publish, scratch
from trainer.snapshot import load_snapshot
from trainer.storage import is_remote

_SPLIT = "test"


@dataclass(frozen=True)
class PortableOptions:
    """How a portable model is written.

    Attributes:
        form: a name of `trainer.portable.formats.FORMATS`.
        inside: bytes of tables that `model.onnx` may hold itself.
        log: requests to compare AUC on; None: those that the model was trained on, if they are there.
        split: of that log; None: test, if the log has one. requests: of it; 0 = all, None = none.
        triton: a folder for a Triton model repository; None = none.
    """

    form: str
    inside: int = 1_000_000
    log: Path | None = None
    split: str | None = None
    requests: int | None = 0
    triton: Path | None = None


def export_portable(
    run: Path | None,
    snapshot: Path | None,
    out: Path,
    options: PortableOptions,
    version: ExportOptions,
    device: DeviceName | None = None,
) -> Path:
    """Write the model of a snapshot, or of a run's checkpoint, into the new folder `out`.

    Args:
        version: how the snapshot of a run is made, which is deleted in the end; device: of the trainer.

    Raises:
        ConfigError: `out` exists, or both of run and snapshot are given, or neither.
        SnapshotError: the model has no portable form, or it scores otherwise; then nothing is published.
    """
    quiet_third_parties()
    if (run is None) == (snapshot is None):
        raise ConfigError("a portable model is of a run or of a snapshot: give one of --run and --snapshot")
    _check(out, options)
    with _snapshot_of(run, snapshot, out, version, device) as folder, scratch(out.parent, out.name) as part:
        portable = portable_of(load_snapshot(folder))
        lines = _write(part, portable, options)
        publish(part, out)
    print(f"portable model {out}: {options.form} of step {portable.signature.step}", *lines, sep="\n")
    if options.triton is not None:
        write_repository(out, options.triton)
    return out


def _check(out: Path, options: PortableOptions) -> None:
    """Refuse what would fail after minutes of work.

    Raises:
        ConfigError, DataError: see `export_portable`; or the log that was named lacks the split.
    """
    for place in (out, options.triton):
        if place is not None and (is_remote(place) or place.exists()):
            raise ConfigError(f"{place}: must be a folder of this machine that does not exist yet")
    if options.triton is not None:
        triton.check(options.form)
        mine, its = out.resolve(), options.triton.resolve()
        if mine == its or mine in its.parents or its in mine.parents:
            raise ConfigError(f"{options.triton}: the Triton repository must lie beside {out}, not in it")
    if options.requests is not None and options.log is not None:
        splits, split = read_manifest(options.log).splits, options.split or _SPLIT
        if split not in splits:
            raise ConfigError(f"{options.log} has no split {split}; it has {', '.join(splits)}: see --split")


def check_portable(folder: Path) -> None:
    """Score a portable model's recorded requests by its runtime on this machine, and say how near they are.

    Raises:
        SnapshotError: the folder is damaged, or a probability differs by more than 1e-6.
    """
    manifest, signature = read(folder)
    inputs, expected = read_recorded(folder, signature)
    found = FORMATS[manifest.form].load(folder / manifest.model)(inputs)
    worst = float(np.abs(found - expected).max())
    if not worst <= BOUND:
        raise SnapshotError(folder, f"scores of the recorded requests differ by {worst:.3g}, above {BOUND:g}")
    print(f"{folder}: recorded requests score as at export, largest difference {worst:.3g}")


def write_repository(folder: Path, out: Path) -> None:
    """Write a Triton model repository of a portable model in ONNX into the new folder `out`."""
    manifest, signature = read(folder)
    with scratch(out.parent, out.name) as part:
        triton.write(part, folder, manifest, signature)
        publish(part, out)
    print(f"Triton model repository {out}: {', '.join(triton.NAMES)}")


@contextmanager
def _snapshot_of(
    run: Path | None, snapshot: Path | None, out: Path, options: ExportOptions, device: DeviceName | None
) -> Iterator[Path]:
    """The snapshot, or one of the run's checkpoint, which goes in the end."""
    if run is None:
        assert snapshot is not None
        yield snapshot
        return
    # On the disk of the result, so that files of tables can be shared.
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.tmp-") as folder,
        process_group(device=device or RunFolder(run).read_config().train.device) as ranks,
    ):
        if ranks.world_size > 1:
            raise ConfigError("export runs in one process; start it without torchrun")
        yield publish_version(run, Path(folder), ranks, options).path


def _write(part: Path, portable: Portable, options: PortableOptions) -> list[str]:
    """Everything of the folder, compared; what is to be said of it."""
    form = FORMATS[options.form]
    form.write(part, portable, options.inside)
    comparison = Comparison(portable, form.load(part / form.model), part / form.model)
    recorded = comparison.of_recorded()
    split, lines = _of_split(comparison, options)
    file, without = dense.write(part, portable, options.form)
    batch = portable.snapshot.recorded.batch
    inputs = portable.arrays(batch)
    write_recorded(part, inputs, portable.expected(batch, inputs))
    manifest = PortableManifest(
        form=options.form,
        model=form.model,
        dense=file,
        no_dense=without,
        snapshot=portable.signature.snapshot,
        worst=max(recorded.worst, split.worst),
        aucs=split.aucs,
        files=(),
        versions=versions(),
    )
    (part / SIGNATURE).write_text(portable.signature.model_dump_json(indent=1) + "\n", encoding="utf-8")
    repository = options.triton.name if options.triton is not None else ""
    (part / README).write_text(page(manifest, portable.signature, repository), encoding="utf-8")
    seal(part, manifest)
    said = [*recorded.lines("recorded requests"), *lines]
    return [*said, *([f"no dense part: {without}"] if without else [])]


def _of_split(comparison: Comparison, options: PortableOptions) -> tuple[Compared, list[str]]:
    """Compare on a split, if there is one."""
    snapshot = comparison.portable.snapshot
    log = options.log or snapshot.manifest.config.data.log
    if options.requests is None:
        return Compared(), []
    if options.log is None and (is_remote(log) or not log.is_dir()):
        return Compared(), [f"no log at {log}: compared on the recorded requests only; see --log"]
    split = options.split or _SPLIT
    if split not in read_manifest(log).splits:
        if options.split is not None:
            raise ConfigError(f"{log} has no split {split} to compare on: see --split")
        return Compared(), [f"{log} has no split {split}: compared on the recorded requests only"]
    reader, remarks = open_requests(snapshot, log, split)
    snapshot.check_vocabularies({**reader.columns.features, **reader.columns.context}, log)
    done = comparison.of_split(reader, options.requests)
    return done, [*remarks, *done.lines(f"{split} requests")]
