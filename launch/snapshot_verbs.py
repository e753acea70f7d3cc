"""The verbs that write and read snapshots; `launch.cli` adds them to the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from launch.options import (
    At,
    Cache,
    Checkpoint,
    Device,
    Dtype,
    Form,
    HistoryLength,
    Inside,
    ParityLog,
    ParitySplit,
    PriorPrecision,
    Search,
    Snapshot,
    Split,
    Triton,
    Uncertainty,
    UncertaintyCandidates,
    Weights,
)
from launch.quick_imports import quick_imports


def export(
    out: Annotated[
        Path, At(metavar="SNAP", help="The snapshot folder to write; with --format, a new folder.")
    ],
    run_folder: Annotated[
        Path | None, At("--run", metavar="RUN", help="A run folder written by `train`.")
    ] = None,
    dtype: Annotated[Dtype | None, Option(help="How tables of representation are stored; fp32.")] = None,
    attention_dtype: Annotated[
        Dtype | None, Option(help="How tables of attention are stored; fp16, and with --format fp32.")
    ] = None,
    since: Annotated[str, Option(metavar="BASE", help="Write only rows that differ from this version.")] = "",
    keep: Annotated[int, Option(min=0, help="Newest versions that stay; 0: all.")] = 0,
    parity_requests: Annotated[
        int | None,
        Option(
            min=0, help="Requests to compare AUC on; 0: none. 1000 of validation; with --format all of test."
        ),
    ] = None,
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
    history_length: HistoryLength = 0,
    uncertainty: Uncertainty = False,
    uncertainty_candidates: UncertaintyCandidates = 200_000,
    prior_precision: PriorPrecision = 0.0,
    form: Form = None,
    snapshot: Annotated[
        Path | None,
        At("--snapshot", metavar="SNAP", help="With --format: a snapshot, in the place of a run."),
    ] = None,
    inside: Inside = None,
    log: ParityLog = None,
    split: ParitySplit = None,
    triton: Triton = None,
) -> None:
    """Write a serving snapshot, checked against the run; or with --format its model for other runtimes."""
    with quick_imports():
        from pipelines.export import export as run
        from pipelines.export_version import ExportOptions

    sure = None
    if uncertainty:
        from pipelines.export_uncertainty import UncertaintyOptions

        sure = UncertaintyOptions(uncertainty_candidates, prior_precision)
    # 0 bytes are asked for, too.
    asked_inside = None if inside is None else str(inside)
    if form is None:
        of_formats: dict[str, object] = {"--snapshot": snapshot, "--log": log, "--triton": triton}
        of_formats |= {"--inside": asked_inside, "--split": split}
        _refuse(of_formats, "goes with --format")
        if run_folder is None:
            raise typer.BadParameter("export needs --run, the run folder whose checkpoint is exported")
        most = 1000 if parity_requests is None else parity_requests
        rest = (most, aoti, vocabularies, checkpoint, device, search, weights, sure, history_length)
        run(run_folder, out, dtype or "fp32", attention_dtype or "fp16", since, keep, *rest)
        return
    of_snapshots: dict[str, object] = {"--since": since, "--keep": keep or None, "--aoti": aoti or None}
    of_snapshots |= {"--search": None if search == "none" else search, "--vocabularies": vocabularies}
    of_snapshots |= {"--uncertainty": uncertainty or None}
    _refuse(of_snapshots, "is of snapshots, and --format writes none")
    if snapshot is not None:
        of_runs = {"--dtype": dtype, "--attention-dtype": attention_dtype, "--checkpoint": checkpoint}
        _refuse(
            of_runs
            | {"--device": device, "--weights": None if weights == "raw" else weights}
            | {"--history-length": history_length or None},
            "goes with --run",
        )
    if form != "onnx":
        _refuse({"--inside": asked_inside, "--triton": triton}, "goes with --format onnx")
    if parity_requests == 0:
        _refuse({"--log": log, "--split": split}, "is for requests to compare on, and --parity-requests is 0")
    from pipelines.export_portable import PortableOptions, export_portable

    version = ExportOptions(
        *(dtype or "fp32", attention_dtype or "fp32"),
        parity_requests=0,
        which=checkpoint,
        weights=weights,
        history_length=history_length,
    )
    requests = None if parity_requests == 0 else parity_requests or 0
    options = PortableOptions(form, 1_000_000 if inside is None else inside, log, split, requests, triton)
    export_portable(run_folder, snapshot, out, options, version, device)


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Raises BadParameter for the first option that was given."""
    for name, value in given.items():
        if value or value is False:
            raise typer.BadParameter(f"{name} {why}")


def portable(
    folder: Annotated[Path, At("--model", metavar="DIR", help="A portable model by `export --format`.")],
    triton: Triton = None,
) -> None:
    """Check a portable model on this machine: its files, and scores of its recorded requests."""
    with quick_imports():
        from pipelines.export_portable import check_portable, write_repository

    check_portable(folder)
    if triton is not None:
        write_repository(folder, triton)


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
