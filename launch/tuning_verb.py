"""The verb that searches for better settings; `launch.cli` adds it to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from launch.options import At, ConfigFile, MoreOverrides, Overrides
from launch.quick_imports import quick_imports


def tune(
    config: ConfigFile,
    space: Annotated[Path, At("--space", metavar="FILE", help="TOML file: parameters, budget and rules.")],
    out: Annotated[Path, At(metavar="STUDY", help="The study's folder; one that exists goes on.")],
    trials: Annotated[int, Option(min=0, help="Of the whole study; 0: as the space says.")] = 0,
    jobs: Annotated[int, Option(min=1, help="Processes of this machine that share the trials.")] = 1,
    storage: Annotated[
        str, Option(metavar="URL", help="A database for the trials; else a journal in the folder.")
    ] = "",
    overrides: Overrides = None,
    more: MoreOverrides = None,
) -> None:
    """Search for better settings, on the validation split."""
    with quick_imports():
        from pipelines.tune.tune import TuneOptions
        from pipelines.tune.tune import tune as run

    run(config, TuneOptions(out, space, storage, trials, jobs), [*(overrides or []), *(more or [])])
