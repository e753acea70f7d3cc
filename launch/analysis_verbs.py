"""The verb that analyses runs; `launch.cli` adds it to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from launch.options import At, Checkpoint, Device, Split, place_of
from launch.quick_imports import quick_imports

# Those of `pipelines.analyze.sections`, which takes seconds to import: --help does not wait for it.
SECTION_NAMES = ("collapse", "entanglement", "gradients", "search", "tables", "quality", "curves")


def analyze(
    runs: Annotated[
        list[Path],
        Argument(metavar="RUN", parser=place_of, help="Run folders, side by side.", show_default=False),
    ],
    out: Annotated[
        Path, At("--out", metavar="DIR", help="The report's folder; an older report is replaced.")
    ],
    what: Annotated[
        str,
        Option(metavar="NAMES", help=f"With commas, of {', '.join(SECTION_NAMES)}; the default: all."),
    ] = "",
    split: Split = "test",
    checkpoint: Checkpoint = "",
    sample: Annotated[
        int, Option(min=0, help="About so many candidates are looked at, those of whole users; 0: all.")
    ] = 20_000,
    seed: Annotated[
        int | None,
        Option(min=0, help="Of every random draw; the default: the run's train.seed.", show_default=False),
    ] = None,
    device: Device = None,
) -> None:
    """Draw what runs have learned, as a page to look at."""
    with quick_imports():
        from pipelines.analyze.analyze import analyze as run
        from pipelines.analyze.options import AnalyzeOptions

    names = tuple(name.strip() for name in what.split(",") if name.strip())
    run(runs, out, AnalyzeOptions(names, split, checkpoint, sample, seed, device))
