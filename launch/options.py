"""Options that several verbs of the command line share."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tandemrec {importlib.metadata.version('tandemrec')}")
        raise typer.Exit()


Version = Annotated[
    bool, Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
]
ConfigFile = Annotated[Path, Option("--config", metavar="FILE", help="TOML configuration.")]
Overrides = Annotated[
    list[str] | None,
    Option("--set", metavar="KEY=VALUE", help="Override one key of the configuration; repeatable."),
]
RunFolder = Annotated[Path, Option("--run", metavar="RUN", help="A run folder written by `train`.")]
Dtype = Literal["fp32", "fp16", "int8"]
Checkpoint = Annotated[
    str,
    Option(
        "--checkpoint",
        metavar="newest|best|STEP",
        help="Default: the best if train.early_stopping looked for one, else the newest.",
        show_default=False,
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    Option("--device", help="Where to compute; the default: the run's train.device.", show_default=False),
]
Split = Annotated[str, Option("--split", help="Which split of the log: train, validation or test.")]
Snapshot = Annotated[Path, Option("--snapshot", metavar="SNAP", help="A snapshot by `export`.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an existing log.")]
