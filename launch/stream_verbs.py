"""The verbs for streams; `launch.cli` adds them to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from launch.options import At, ConfigFile, MoreOverrides, Overrides, Overwrite


def windows(
    log: Annotated[Path, At(metavar="LOG", help="A sequence log.")],
    out: Annotated[Path, At(metavar="STREAM", help="The stream's folder to write.")],
    every: Annotated[str, Option(metavar="TIME", help="Of a window: 1d, 6h, 30m or 90s.")] = "1d",
    first: Annotated[
        str,
        Option("--from", metavar="TIME", help="Where the first window begins, such as 2017-12-01 (UTC)."),
    ] = "",
    splits: Annotated[str, Option(help="Of the log, with commas.")] = "train,validation,test",
    before: Annotated[
        Path | None, At(metavar="LOG", help="A log to write of the requests before the first window.")
    ] = None,
    max_history: Annotated[
        int, Option(min=0, help="The newest behaviors that a request keeps at least; 0: all.")
    ] = 0,
    pace: Annotated[
        float, Option(min=0, metavar="SECONDS", help="Let the windows appear one by one, so far apart.")
    ] = 0.0,
    overwrite: Overwrite = False,
) -> None:
    """Cut a log by time into the windows of a stream."""
    from pipelines.windows import WindowOptions, second_of, seconds_of
    from pipelines.windows import windows as run

    begin = second_of(first, "--from") if first else None
    names = tuple(name.strip() for name in splits.split(",") if name.strip())
    options = WindowOptions(seconds_of(every, "--every"), begin, names, max_history, pace)
    run(log, out, options, before, overwrite)


def online(
    config: ConfigFile,
    stream: Annotated[Path, At(metavar="STREAM", help="The folder of a stream, see docs/online.md.")],
    out: Annotated[Path, At(metavar="RUN", help="The run folder; one that exists goes on.")],
    snapshots: Annotated[
        Path | None, At(metavar="SNAP", help="Where versions are published; else nothing is.")
    ] = None,
    windows: Annotated[int, Option(min=0, help="To train before it ends; 0: all that are there.")] = 0,
    follow: Annotated[bool, Option("--follow", help="Wait for more windows.")] = False,
    overrides: Overrides = None,
    more: MoreOverrides = None,
) -> None:
    """Train a stream window by window and publish what was learnt."""
    from pipelines.online.online import OnlineJob
    from pipelines.online.online import online as run

    run(config, OnlineJob(stream, out, snapshots, windows, follow), [*(overrides or []), *(more or [])])
