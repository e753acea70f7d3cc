"""`tandemrec export`: from a run's newest checkpoint to a serving snapshot that is shown to score alike."""

from __future__ import annotations

from pathlib import Path

from embeddings.errors import ConfigError
from embeddings.lookup.stored import Dtype
from pipelines.console import quiet_third_parties
from pipelines.export_uncertainty import UncertaintyOptions
from pipelines.export_version import ExportOptions, Published, publish_version
from trainer.checkpoint.averages import Weights
from trainer.ranks.device import DeviceName
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder
from trainer.snapshot.manifest import SearchPart, SnapshotIds
from trainer.snapshot.search import SearchKind


def export(
    run: Path,
    out: Path,
    dtype: Dtype = "fp32",
    attention_dtype: Dtype = "fp16",
    since: str = "",
    keep: int = 0,
    parity_requests: int = 1000,
    aoti: bool = False,
    vocabularies: bool | None = None,
    which: str = "",
    device: DeviceName | None = None,
    search: SearchKind = "none",
    weights: Weights = "raw",
    uncertainty: UncertaintyOptions | None = None,
    history_length: int = 0,
) -> Path:
    """Publish a checkpoint of `run` as the next version under `out`, and say what was written.

    Args:
        device: on which the trainer's own scores are made; None = where the run was to train.
        dtype, attention_dtype, since, keep, parity_requests, aoti, vocabularies, which, search, weights,
            uncertainty, history_length: see `pipelines.export_version.ExportOptions`.

    Raises:
        ConfigError: started with several processes. SnapshotError, CheckpointError: see `publish_version`.
    """
    quiet_third_parties()
    options = ExportOptions(
        *(dtype, attention_dtype, since, keep, parity_requests, aoti, vocabularies, which, search, weights),
        uncertainty,
        history_length,
    )
    with process_group(device=device or RunFolder(run).read_config().train.device) as ranks:
        if ranks.world_size > 1:
            raise ConfigError("export runs in one process; start it without torchrun")
        published = publish_version(run, out, ranks, options)
    print("\n".join(report_lines(published)))
    return published.path


def report_lines(published: Published) -> list[str]:
    """What a version holds and how it compares, for a terminal."""
    manifest = published.manifest
    sizes = dict.fromkeys(("tables", "search", "ids", "vocab", "code"), 0.0) | {"the rest": 0.0}
    for path, entry in manifest.listed().items():
        folder = path.split("/")[0]
        sizes[folder if folder in sizes else "the rest"] += entry.bytes / 1e6
    parts = ", ".join(f"{part} {size:,.1f}" for part, size in sizes.items() if size or part == "search")
    kinds = ", ".join(f"{name} {tables[0].dtype}" for name, tables in manifest.groups.items())
    lines = [
        f"snapshot {published.path}: step {manifest.step}, {sum(sizes.values()):,.1f} MB ({parts}); {kinds}",
        *(_search_line(name, part) for name, part in manifest.search.items()),
        *(_ids_line(name, entry) for name, entry in manifest.ids.items()),
    ]
    if manifest.base is not None:
        held = [(stored.held, stored.rows) for _, _, stored in manifest.matrices()]
        changed, rows = map(sum, zip(*held, strict=True))
        lines.append(f"delta against version {manifest.base.number}: {changed:,} of {rows:,} rows")
    return lines + published.parity.lines(published.split)


def _search_line(branch: str, part: SearchPart) -> str:
    if part.reason:
        return f"no search part for {branch}: {part.reason}"
    named = sum(1 for entry in part.tables if entry.table)
    own = [f"{entry.side} of {entry.feature} {entry.dtype}" for entry in part.tables if not entry.table]
    held = [*([f"rows of {named} tables as they are"] if named else []), *own]
    return f"search part for {branch}: {', '.join(held)}"


def _ids_line(name: str, entry: SnapshotIds) -> str:
    line = f"ids of {name}: {entry.live:,} of at most {entry.capacity:,} have a row"
    if entry.base_live is None:
        return line
    return f"{line}; {entry.set:,} new or moved, {entry.gone:,} gone since the base (tombstones)"
