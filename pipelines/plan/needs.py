"""What a run on a cluster needs in each stage, as a table with a verdict, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from embeddings.lookup.stored import Dtype, row_bytes
from embeddings.plan.memory import gigabytes, memory_of_ranks
from embeddings.plan.planner import PlanEstimate
from embeddings.plan.request import Cluster
from pipelines.console import table_lines
from trainer.checkpoint.files import bytes_of_all
from trainer.needs.run_needs import (
    FITS,
    Need,
    Run,
    disk_needs,
    export_need,
    memory_needs,
)
from trainer.run_folder import RunFolder
from trainer.snapshot.writing import group_dtypes


def all_needs(
    run: Run, found: PlanEstimate, cluster: Cluster, for_tables: int, out: Path | None
) -> list[Need]:
    """Of training, saving, resuming and export, of checkpoints and of a snapshot.

    Args:
        for_tables: bytes of host memory for a rank's tables, or of a disk where they lie in mapped files.
        out: the run's folder, whose disk is asked for its free bytes.
    """
    held = memory_of_ranks(found.options, found.tables, cluster.world_size, cluster.device)
    there = 0 if out is None else bytes_of_all(RunFolder(out).checkpoints)
    return [
        *memory_needs(run, held, cluster, for_tables),
        export_need(run, cluster),
        *disk_needs(run, held, cluster.device, out, there),
        *snapshot_needs(run),
    ]


def snapshot_needs(run: Run) -> list[Need]:
    """A snapshot as `export` writes it unless told otherwise, and one of the narrowest type."""
    needs = []
    kinds: tuple[tuple[Dtype, Dtype], ...] = (("fp32", "fp16"), ("int8", "int8"))
    for dtype, attention in kinds:
        dtypes = group_dtypes(run.config, dtype, attention)
        words = dtype if dtype == attention else f"{dtype}, attention {attention}"
        size = sum(
            table.rows * row_bytes(table.dim, dtypes[group.name])
            for group in run.groups.values()
            for table in group.tables
        )
        needs.append(Need(f"snapshot ({words})", "disk", size + run.dense, None, "export with --dtype int8"))
    return needs


def need_table(needs: Sequence[Need], out: Path | None) -> list[str]:
    """The table, a line for each thing that does not fit, and the verdict; `out` as in `all_needs`."""
    head = ("stage", "where", "needs", "there are", "share", "verdict")
    rows = []
    for need in needs:
        room = ("-", "-") if need.room is None else (gigabytes(need.room), _share(need))
        rows.append((need.stage, need.where, gigabytes(need.bytes), *room, need.verdict or "-"))
    wrong = [need for need in needs if need.verdict not in ("", FITS)]
    training = next(need for need in needs if need.stage == "training")
    biggest = "; ".join(
        f"{name} {gigabytes(size)}"
        for name, size in sorted(training.parts.items(), key=lambda part: -part[1])
    )
    return [
        "what a run needs at its peak (steps, reading and processes are estimates)",
        *table_lines(head, rows),
        f"in {training.stage}: {biggest}",
        *[line for need in wrong for line in _wrapped(need.line())],
        f"verdict: {verdict(needs, out)}",
    ]


def verdict(needs: Sequence[Need], out: Path | None) -> str:
    """The worst of all; `out` as in `all_needs`."""
    disk = "give --out for the disk" if out is None else f"what {out} has room for is not known"
    wrong = [need for need in needs if need.verdict not in ("", FITS)]
    if not wrong:
        return "everything fits" if all(need.verdict for need in needs[:-2]) else f"{FITS}; {disk}"
    # As `Need.verdict` says them, worst first.
    worst = sorted({need.verdict for need in wrong})[0]
    return f"{worst}: {', '.join(dict.fromkeys(need.stage for need in wrong if need.verdict == worst))}"


def needs_tree(needs: Sequence[Need]) -> list[dict[str, Any]]:
    """For JSON, in bytes."""
    return [{**asdict(need), "parts": dict(need.parts), "verdict": need.verdict} for need in needs]


def _share(need: Need) -> str:
    return f"{need.bytes / need.room:.0%}" if need.room else "-"


def _wrapped(line: str, width: int = 108) -> list[str]:
    """A line in several, the later ones indented."""
    lines, words = [""], line.split(" ")
    for word in words:
        if len(lines[-1]) + len(word) >= width and lines[-1]:
            lines.append("  ")
        lines[-1] += word if not lines[-1].strip() else f" {word}"
    return lines
