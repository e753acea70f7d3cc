"""The verbs that write and read snapshots; `launch.cli` adds them to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from launch.options import (
    At,
    Cache,
    Checkpoint,
    Device,
    Dtype,
    PriorPrecision,
    RunFolder,
    Search,
    Snapshot,
    Split,
    Uncertainty,
    UncertaintyCandidates,
    Weights,
)
from launch.quick_imports import quick_imports


def export(
    run_folder: RunFolder,
    out: Annotated[Path, At(metavar="SNAP", help="The snapshot folder to write.")],
    dtype: Annotated[Dtype, Option(help="How tables of representation are stored.")] = "fp32",
    attention_dtype: Annotated[Dtype, Option(help="How tables of attention are stored.")] = "fp16",
    since: Annotated[str, Option(metavar="BASE", help="Write only rows that differ from this version.")] = "",
    keep: Annotated[int, Option(min=0, help="Newest versions that stay; 0: all.")] = 0,
    parity_requests: Annotated[
        int, Option(min=0, help="Validation requests to compare AUC on; 0: none.")
    ] = 1000,
    aoti: Annotated[bool, Option("--aoti", help="Add the dense part as machine code (g++).")] = False,
    vocabularies: Annotated[
        bool | None,
        Option(
            "--vocabularies/--no-vocabularies",
            help="Add the values that the ids stand for; the default: if they are small.",
        ),
    ] = None,
    checkpoint: Checkpoint = "",
    device: Device = None,
    search: Annotated[
        Search, Option(help="For a retrieval service: add the vectors that are projected from tables.")
    ] = "none",
    weights: Weights = "raw",
    uncertainty: Uncertainty = False,
    uncertainty_candidates: UncertaintyCandidates = 200_000,
    prior_precision: PriorPrecision = 0.0,
) -> None:
    """Write a serving snapshot, checked against the run."""
    with quick_imports():
        from pipelines.export import export as run

    sure = None
    if uncertainty:
        from pipelines.export_uncertainty import UncertaintyOptions

        sure = UncertaintyOptions(uncertainty_candidates, prior_precision)
    rest = (parity_requests, aoti, vocabularies, checkpoint, device, search, weights, sure)
    run(run_folder, out, dtype, attention_dtype, since, keep, *rest)


def score(
    snapshot: Snapshot,
    requests: Annotated[Path, At(metavar="LOG", help="A sequence log.")],
    out: Annotated[Path, At(metavar="FILE", help="Scores to write, Parquet.")],
    split: Split = "test",
    limit: Annotated[int, Option(min=0, help="At most so many requests; 0: all.")] = 0,
    against: Annotated[
        Path | None, At(metavar="FILE", help="Scores kept by `evaluate` to compare with.")
    ] = None,
    cache: Cache = None,
    uncertainty: Annotated[
        bool, Option("--uncertainty", help="Add mean and deviation of each logit; see `export`.")
    ] = False,
) -> None:
    """Score requests with a snapshot, without the trainer."""
    with quick_imports():
        from pipelines.score import score as run

    run(snapshot, requests, split, limit, out, against, cache, uncertainty)


def vectors(
    snapshot: Snapshot,
    log: Annotated[Path, At(metavar="LOG", help="A sequence log of the snapshot's vocabulary.")],
    out: Annotated[Path, At(metavar="DIR", help="The folder to write.")],
    of: Annotated[Literal["items", "users"], Option(help="What a row is.")] = "items",
    space: Annotated[
        Literal["attention", "query", "representation", "towers", "retrieval"],
        Option(help="Which vectors; docs/vectors.md."),
    ] = "attention",
    branch: Annotated[str, Option(help="Of a model with several.")] = "main",
    task: Annotated[str, Option(help="Whose logit, for --space towers; the default: the first.")] = "",
    item: Annotated[str, Option(metavar="FEATURE", help="The feature that names an item.")] = "item_id",
    index: Annotated[Literal["none", "flat", "hnsw", "ivf"], Option(help="Add a FAISS index.")] = "none",
    recall: Annotated[
        float, Option(min=0, max=1, help="Share of the 100 best that the index shall find.")
    ] = 0.95,
    split: Annotated[
        str, Option(help="Whose users are written, or ask the index: train, validation or test.")
    ] = "test",
    queries: Annotated[int, Option(min=1, help="How many ask the index.")] = 1000,
    groups: Annotated[
        str, Option(metavar="IDS", help="With commas: the groups that users have vectors for; empty: all.")
    ] = "",
    seed: Annotated[
        int | None,
        Option(min=0, help="Of every random draw; the default: the run's train.seed.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace older vectors.")] = False,
    cache: Cache = None,
) -> None:
    """Write vectors of items or users for retrieval."""
    with quick_imports():
        from pipelines.vectors.options import VectorOptions, groups_of
        from pipelines.vectors.vectors import write_vectors

    chosen = groups_of(groups)
    asked = (of, space, branch, task, item, index, recall, split, queries, chosen, seed, overwrite)
    write_vectors(snapshot, log, out, VectorOptions(*asked), cache)
