"""Options that several verbs of the command line share."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Annotated, Literal

import typer


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tandemrec {importlib.metadata.version('tandemrec')}")
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
]
ConfigFile = Annotated[Path, typer.Option("--config", metavar="FILE", help="TOML configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the configuration; repeatable."),
]
RunFolder = Annotated[Path, typer.Option("--run", metavar="RUN", help="A run folder written by `train`.")]
Dtype = Literal["fp32", "fp16", "int8"]
Checkpoint = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="newest|best|STEP",
        help="Default: the best if train.early_stopping looked for one, else the newest.",
        show_default=False,
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(
        "--device", help="Where to compute; the default: the run's train.device.", show_default=False
    ),
]
Split = Annotated[str, typer.Option("--split", help="Which split of the log: train, validation or test.")]
